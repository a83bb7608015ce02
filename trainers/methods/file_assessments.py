"""What is measured on the weights of a finished run whose pictures are in files: other pictures of the same classes, the score of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.augment import to_float
from gkl.data.content import check_same, listing
from gkl.data.files import Split, other_pictures
from gkl.distributed import all_reduce, rank, world_size
from gkl.models.batch_norm import eval_mode
from trainers.loop.accuracy import batches_of, eval_batch_size
from trainers.methods.assessments import Assessment, Measured, Subject


class FileAssessment(Assessment):
    """Base of these."""

    def check_data(self, data: Any) -> None:
        """Raises ValueError for other data."""
        if data.in_memory:
            raise ValueError(
                f"assessment={self.name} needs pictures in files (imagenet, image_files, ...), got {data.name}"
            )


@dataclass(frozen=True)
class Renditions(FileAssessment):
    """Top-1 on ImageNet-R, among its classes alone, and on ImageNet-Sketch (Table XIII), with the test view.

    root: the folder above the two. renditions, sketch: their folders, <class>/* each. classes: that ImageNet-R must have.
    content: what gkl.data.content.listing says of the two folders, if they must be those.
    """

    root: str
    renditions: str
    sketch: str
    classes: int
    content: str | None = None

    def check(self) -> None:
        """Raises ValueError naming a folder that is missing, or that has changed."""
        wanted = {"ImageNet-R": self.renditions, "ImageNet-Sketch": self.sketch}
        missing = [
            f"{what} at {Path(self.root) / f}"
            for what, f in wanted.items()
            if not (Path(self.root) / f).is_dir()
        ]
        if missing:
            raise ValueError(
                f"no {' and no '.join(missing)}; unpack their class folders there, or set assessment.root=..."
            )
        places = [f"{self.root}/{folder}" for folder in wanted.values()]
        check_same(f"the pictures at {' and '.join(places)}", self.content, lambda: listing(*places))

    def __call__(self, subject: Subject) -> Measured:
        """Metrics imagenet_r and imagenet_sketch."""
        metrics, details = {}, {}
        for metric, (pictures, among) in self._others(subject.data).items():
            hits = torch.zeros(2, dtype=torch.float64, device=subject.device)
            for logits, y in _predictions(subject, pictures):
                predicted = logits.masked_fill(~among.to(logits.device), float("-inf")).argmax(1)
                hits += torch.stack([(predicted == y).sum(), torch.tensor(len(y), device=y.device)])
            right, total = all_reduce(hits).tolist()
            metrics[metric] = 100.0 * right / total
            details[metric] = {"n": int(total), "classes": int(among.sum())}
        return metrics, details

    def check_data(self, data: Any) -> None:
        """Nor on other classes than the data's."""
        super().check_data(data)
        self._others(data)

    def _others(self, data: Any) -> dict[str, tuple[Split, Tensor]]:
        """The pictures of each metric, and which of the data's classes they have."""
        wanted = {"imagenet_r": (self.renditions, self.classes), "imagenet_sketch": (self.sketch, None)}
        return {
            metric: other_pictures(Path(self.root) / folder, data.class_names, classes)
            for metric, (folder, classes) in wanted.items()
        }


@dataclass(frozen=True)
class ClassScores(FileAssessment):
    """Mean predicted probability of the true class over each class's training pictures, with the test view (Figure 3)."""

    def __call__(self, subject: Subject) -> Measured:
        """Details: `scores` and `pictures`, one a class; `shots`, the bounds of many and few where the data set has them."""
        classes = subject.data.num_classes
        sums, counts = (torch.zeros(classes, dtype=torch.float64, device=subject.device) for _ in range(2))
        for logits, y in _predictions(subject, subject.data.train):
            own = F.softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)
            sums.index_add_(0, y, own.double())
            counts += torch.bincount(y, minlength=classes)
        sums, counts = all_reduce(sums), all_reduce(counts)
        scores = (sums / counts.clamp_min(1)).tolist()
        return {}, {
            "scores": [round(s, 6) for s in scores],
            "pictures": [int(n) for n in counts],
            "shots": list(subject.data.shots or ()),
        }


def _predictions(subject: Subject, part: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of this process's share of a split's pictures, on the device, batch by batch."""
    mine = torch.arange(len(part.labels)).tensor_split(world_size())[rank()]
    with eval_mode(subject.model), torch.no_grad():
        for x, y in batches_of(subject.data, mine, eval_batch_size(subject.device), subject.workers, part):
            yield subject.model(to_float(x.to(subject.device))), y.to(subject.device)
