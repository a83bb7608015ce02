"""Semantic segmentation: a network alone, and APD's distillation (Tian et al. 2022), with GKL in its KL's place (Table XXIII).

    loss = CE + aux_weight CE(auxiliary) + divergence_weight D(student || teacher)
           + centres_weight KL(similarity to the student's class centres || to the teacher's) + align_weight (1 - cos of the centres) / 2

CE and centres are means over one card's pictures, bn_groups cards a batch; batch norm sees the pictures of all. The teacher's features
go through a transform that learns the classes from their own similarities, one step before the student's.
Source: tool/train.py of dvlab-research/APD.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.batches import Batch
from gkl.data.dense import IGNORED
from gkl.data.label_pictures import as_png
from gkl.distributed import all_reduce, rank, world_size
from gkl.evaluation.dense import Counts, segmented
from gkl.losses.class_centres import agreement, alignment, class_centres, members
from gkl.losses.dense import Divergence, labelled_cross_entropy
from gkl.models.batch_norm import eval_mode
from gkl.models.pspnet import Maps, PSPNet, resized
from gkl.models.sync_batch_norm import synchronised
from gkl.models.timm_network import set_sample_keys
from gkl.rng import sample_keys
from trainers.loop.accuracy import batches_of, test_page
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training
from trainers.methods.source import Source, check_same_teacher

IMAGENET_CLASSES, SHOWN_PICTURES = 1000, 4


@dataclass(kw_only=True)
class Segmentation(Method):
    """A network alone. aux_weight: of the auxiliary head's loss. initial: the classifier of ImageNet whose stages it begins with.

    mirrored: in testing, a picture's prediction is averaged with that of its mirror image.
    """

    aux_weight: float
    mirrored: bool = True
    initial: Source | None = None
    classifies: ClassVar[bool] = False

    def adapt(self, model: nn.Module) -> nn.Module:
        """Batch norm over all processes. Raises ValueError for a network without an auxiliary head."""
        if not isinstance(model, PSPNet):
            raise ValueError(f"segmentation needs a network of gkl.models.pspnet, got {type(model).__name__}")
        return synchronised(model)

    def bind(self, training: Training) -> None:
        """Begin with the pretrained stages."""
        super().bind(training)
        self.data: Any = training.data
        network: Any = self.model
        self.started: dict[str, Any] = {}
        if self.initial is not None:
            classifier, self.started = self.initial.load(IMAGENET_CLASSES)
            network.begin_from(classifier)

    # --- a step -------------------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Views, their labels, and the keys of what is dropped in the network."""
        training = self.training
        place = step * training.setup.batch_size + training.shard.mine(training.batches.samples(step))
        keys = sample_keys(
            self.training.seed, epoch, place.to(self.device, non_blocking=True), "inside_the_network"
        )
        return batch.images, batch.labels, keys

    def maps(self, network: Any, x: Tensor) -> Maps:
        """A network's maps in float32 or better, whatever precision it computes in."""
        compute = self.training.compute
        with compute.autocast():
            found: Maps = network.forward_maps(x.contiguous(memory_format=compute.memory_format))
        return Maps(*(each.to(self.dtype) for each in found))

    def update(self, images: Tensor, labels: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """One update; every term is this process's share of its mean over the cards."""
        x = images.to(self.dtype)
        self.model.train()
        set_sample_keys(self.model, keys)
        maps = self.maps(self.model, x)
        logits = resized(maps.logits, labels.shape[1:])  # (b, C, H, W)
        terms = {
            "labels": self.over_cards(logits, labels),
            "auxiliary": self.aux_weight * self.over_cards(resized(maps.auxiliary, labels.shape[1:]), labels),
            **self.terms(x, maps, logits, labels),
        }
        self.optimizer_step(torch.stack(list(terms.values())).sum())
        self.after_step()
        return {f"loss/{name}": value.detach() for name, value in terms.items()}

    def terms(self, x: Tensor, maps: Maps, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What a teacher adds to the loss. x: (b, 3, H, W). logits: (b, C, H, W). labels: (b, H, W)."""
        return {}

    def over_cards(self, logits: Tensor, labels: Tensor) -> Tensor:
        """This process's share of the cross-entropy, the mean over the cards of each one's mean over its labelled pixels."""
        size = self.training.group_size
        own = zip(logits.split(size), labels.split(size), strict=True)
        means = [labelled_cross_entropy(*one, IGNORED) for one in own]
        return torch.stack(means).sum() / self.cards

    @property
    def cards(self) -> int:
        """Among how many a batch is shared out."""
        return self.training.shard.groups

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """A step 3, and the teacher's forward 1."""
        return {"model": 3.0, **({"teacher.network": 1.0} if config.get("teacher") else {})}

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """mIoU and pixel accuracy of the middle of each test picture, which is quick."""
        counts = torch.zeros(3, self.data.num_classes, dtype=torch.int64, device=self.device)
        numbers = torch.arange(len(self.data.test)).tensor_split(world_size())[rank()]
        with torch.no_grad(), eval_mode(self.model):
            for x, labels in batches_of(self.data, numbers, 8, self.training.workers):
                logits = self.logits(x.to(self.device, self.dtype))
                counts += Counts.of(logits.argmax(1), labels.to(self.device), self.data.num_classes).rows()
        found = Counts.from_rows(all_reduce(counts).cpu())
        return {"test/miou": found.miou(), "test/pixel_accuracy": found.pixel_accuracy()}

    def measured(self, network: nn.Module) -> Counts:
        """Of whole test pictures, each looked at through windows by one process."""
        counts = torch.zeros(3, self.data.num_classes, dtype=torch.int64, device=self.device)
        with torch.no_grad(), eval_mode(network):
            for number in range(rank(), len(self.data.test), world_size()):
                image, labels = test_page(self.data, number)
                found = self.predicted(network, image)
                counts += Counts.of(found, labels.to(self.device), self.data.num_classes).rows()
        return Counts.from_rows(all_reduce(counts).cpu())

    def predicted(self, network: nn.Module, image: Tensor) -> Tensor:
        """The class of each pixel (H, W) of a picture (3, H, W) uint8, by a network in eval mode."""
        x = (image.to(self.device).float() / 255.0).to(self.dtype)
        data = self.data
        return segmented(
            lambda views: self.logits(views, network),
            x,
            data.num_classes,
            data.image_size,
            data.long_side,
            self.mirrored,
        )

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`miou` and `pixel_accuracy` of the headline's weights, percent; in the details each class's IoU."""
        self.model.load_state_dict(self.training.weights()[headline])
        counts = self.measured(self.model)
        iou = dict(zip(self.data.class_names, counts.iou(), strict=True))
        shown = [self.shown(number) for number in range(min(SHOWN_PICTURES, len(self.data.test)))]
        return {"miou": counts.miou(), "pixel_accuracy": counts.pixel_accuracy()}, {
            "weights": headline,
            "iou": iou,
            "shown": shown,
        }

    def shown(self, number: int) -> dict[str, str]:
        """A test picture, its truth, and what the model makes of it."""
        image, labels = test_page(self.data, number)
        with torch.no_grad(), eval_mode(self.model):
            found = self.predicted(self.model, image)
        return {"picture": as_png(image), "truth": as_png(labels), "predicted": as_png(found)}

    def origins(self) -> dict[str, Any]:
        """Where the stages come from."""
        return {"initial": self.started} if self.started else {}


@dataclass(kw_only=True)
class APD(Segmentation):
    """Adaptive perspective distillation.

    divergence: between the logits at full size. divergence_weight, centres_weight, align_weight: kl, kmeans and proto in the released
    code. sharpness: of the similarities, kmeans_temp there. transform_lr: of the teacher's transform, whose Adam has it to the end.
    count_ignored: the divergence counts pixels without a label, and those beyond a picture, as the released code's does.
    """

    teacher: Source
    divergence: Divergence
    divergence_weight: float
    centres_weight: float
    align_weight: float
    sharpness: float
    transform_lr: float
    count_ignored: bool = True

    def bind(self, training: Training) -> None:
        """Load the teacher and make both transforms."""
        super().bind(training)
        loaded, self.origin = self.teacher.load(self.data.num_classes)
        if not isinstance(loaded, PSPNet):
            raise ValueError(f"APD needs a teacher of gkl.models.pspnet, got {type(loaded).__name__}")
        self.taught_by = training.compute.to_device(loaded).eval().requires_grad_(False)
        pair: tuple[Any, Any] = (self.model, loaded)
        self.own_transform, self.teacher_transform = (
            training.compute.to_device(transform(network.num_features)) for network in pair
        )
        self.transform_optimizer = torch.optim.Adam(
            self.teacher_transform.parameters(), lr=self.transform_lr, betas=(0.9, 0.99)
        )
        training.fuse_optimizer(self.transform_optimizer)

    def trained_module(self) -> nn.Module:
        """The student and its transform."""
        return nn.ModuleList([self.model, self.own_transform])

    def terms(self, x: Tensor, maps: Maps, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The divergence, and what class centres say; the teacher's transform takes its step here."""
        with torch.no_grad():
            taught = self.maps(self.taught_by, x)
            target = resized(taught.logits, labels.shape[1:])
        counted = None if self.count_ignored else labels != IGNORED
        pixels = self.samples * labels[0].numel() if counted is None else all_reduce(counted.sum())
        divergence = self.divergence(logits, target, counted).sum() / pixels
        agreement, alignment = self.by_centres(maps.features, taught.features, labels)
        return {
            "divergence": self.divergence_weight * divergence,
            "centres": self.centres_weight * agreement,
            "alignment": self.align_weight * alignment,
        }

    def by_centres(self, features: Tensor, taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of both terms of the class centres, means over the cards. features, taught: (b, D, h, w). labels: (b, H, W)."""
        near = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest")[:, 0].long()
        own, given = self.own_transform(features), self.teacher_transform(taught)
        size = self.training.group_size
        classified, agreements, alignments = [], [], []
        for student, teacher, marked, full in zip(
            own.split(size), given.split(size), near.split(size), labels.split(size), strict=True
        ):
            here, present = members(marked, self.data.num_classes, self.dtype)
            one, other = (class_centres(x, here, self.sharpness) for x in (student, teacher))
            seen = resized(other.similarity * present[:, None, None], full.shape[1:])
            classified.append(labelled_cross_entropy(seen, full, IGNORED))
            agreements.append(agreement(one, other, present))
            alignments.append(alignment(one, other, present))
        self.optimizer_step(torch.stack(classified).sum() / self.cards, self.transform_optimizer)
        return torch.stack(agreements).sum() / self.cards, torch.stack(alignments).sum() / self.cards

    # --- what is kept -------------------------------------------------------------------------------------------------

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """As of a network alone; the teacher's mIoU goes into the record, too."""
        self.origin["miou"] = self.measured(self.taught_by).miou()
        return super().evaluate(headline=headline, settings=settings, folder=folder, console=console)

    def origins(self) -> dict[str, Any]:
        """The teacher, and where the stages come from."""
        return {"teacher": self.origin, **super().origins()}

    def state_dict(self) -> dict[str, Any]:
        """Both transforms, the teacher's optimizer, and which teacher it was."""
        return {
            "teacher": self.origin,
            "own_transform": self.own_transform.state_dict(),
            "teacher_transform": self.teacher_transform.state_dict(),
            "transform_optimizer": self.transform_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises ConfigError for a checkpoint that was trained with another teacher."""
        check_same_teacher(state["teacher"], self.origin)
        self.own_transform.load_state_dict(state["own_transform"])
        self.teacher_transform.load_state_dict(state["teacher_transform"])
        self.transform_optimizer.load_state_dict(state["transform_optimizer"])
        self.training.fuse_optimizer(self.transform_optimizer)


def transform(channels: int) -> nn.Module:
    """What features go through before they are compared."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)
    )
