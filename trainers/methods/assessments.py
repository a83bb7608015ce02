"""What is measured on a finished run's weights beside its own record: AutoAttack at other radii, PGD and CW, class structure;
on pictures in files, trainers.methods.file_assessments.

An assessment is a configs/assessment file and a class here: called with a Subject it returns metrics in percent, which
tables show, and details, which figures draw. It runs on every process of a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.attacks.pgd import pgd, random_start
from gkl.data.batches import first_of_each_class
from gkl.distributed import rank
from gkl.evaluation import pgd_robust
from gkl.evaluation.chosen import chosen
from gkl.models.batch_norm import eval_mode
from gkl.models.timm_network import TimmNetwork
from gkl.rng import sample_keys
from trainers.loop.accuracy import attack_name, autoattack_result, eval_batch_size
from trainers.loop.console import Console


@dataclass(frozen=True)
class Subject:
    """A trained network and what it is tested with. settings: the run's configs/evaluation file.

    data: ImageData, or ImageFiles, whose pictures `workers` processes read.
    """

    model: nn.Module
    data: Any
    settings: Mapping[str, Any]
    folder: Path
    device: torch.device
    console: Console
    workers: int = 0

    def attacked(self) -> Tensor:
        """The numbers of the test images that the run's own record attacked."""
        return chosen(self.data, self.settings["images"])


def percent(flags: Tensor) -> float:
    """The share of true flags."""
    return 100.0 * flags.double().mean().item()


Measured = tuple[dict[str, float], dict[str, Any]]


@dataclass(frozen=True)
class Assessment:
    """Base of all. name: of its file beside the record."""

    name: str
    attacks: ClassVar[bool] = False  # as the run's evaluation says

    def check(self) -> None:
        """Before the run's training: raises ValueError when what it needs is missing."""

    def check_data(self, data: Any) -> None:
        """Likewise for data that it cannot be made on."""
        if not data.in_memory:
            raise ValueError(
                f"assessment={self.name} needs pictures in memory (cifar100, image_folder, ...), got {data.name}"
            )

    def check_network(self, network: Any) -> None:
        """Likewise for a network that it cannot be made on."""

    def __call__(self, subject: Subject) -> Measured:
        """Metrics in percent, and details. Runs on every process."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


@dataclass(frozen=True)
class Epsilons(Assessment):
    """AutoAttack at several radii and their average (Table XIV). eighths: of the evaluation's epsilon."""

    eighths: Sequence[int]
    attacks: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> Measured:
        """Metrics aa_<eighths> and aa_average; of the screen screen_<eighths> and screen_average."""
        metrics, name = {}, attack_name(subject.settings)
        for eighths in self.eighths:
            settings = {**subject.settings, "epsilon": subject.settings["epsilon"] * eighths / 8}
            flags = autoattack_result(subject.model, subject.data, settings, **_place(subject)).robust_flags
            metrics[f"{name}_{eighths}"] = percent(flags)
        metrics[f"{name}_average"] = sum(metrics.values()) / len(metrics)
        return metrics, {"n": len(subject.attacked())}


@dataclass(frozen=True)
class Attacks(Assessment):
    """PGD and CW of several lengths, and the share of images that withstand these and AutoAttack (Table XV)."""

    steps: Sequence[int]
    attacks: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> Measured:
        """Metrics pgd<steps>, cw<steps>, worst; worst_screen where the screen stands in for AutoAttack."""
        numbers = subject.attacked()
        worst = autoattack_result(
            subject.model, subject.data, subject.settings, **_place(subject)
        ).robust_flags
        metrics = {}
        for loss in ("ce", "cw"):
            for steps in self.steps:
                with eval_mode(subject.model):
                    flags = pgd_robust(
                        subject.model,
                        subject.data.test_images[numbers],
                        subject.data.test_labels[numbers],
                        epsilon=subject.settings["epsilon"],
                        step_size=subject.settings["epsilon"] / 4,
                        steps=steps,
                        norm=subject.settings["norm"],
                        loss=loss,
                        batch_size=subject.settings["batch_size"],
                        device=subject.device,
                    )
                metrics[f"{'pgd' if loss == 'ce' else 'cw'}{steps}"] = percent(flags)
                worst = worst & flags
        metrics["worst" if attack_name(subject.settings) == "aa" else "worst_screen"] = percent(worst)
        return metrics, {"n": len(numbers)}


@dataclass(frozen=True)
class Structure(Assessment):
    """Margins of the classes (Eq. 14, clean test images) and a t-SNE of natural and adversarial features (Fig. 4).

    classes: how many, drawn with a fixed seed; all when there are fewer. images: natural ones of those classes.
    steps: of the PGD that makes the adversarial ones.
    """

    classes: int
    images: int
    steps: int
    perplexity: float
    attacks: ClassVar[bool] = True

    def check_network(self, network: Any) -> None:
        """It embeds what stands before the classifier."""
        inner = network.model if isinstance(network, TimmNetwork) else network
        if not (hasattr(inner, "forward_features") and hasattr(inner, "forward_head")):
            raise ValueError(
                f"assessment={self.name} embeds a network's features, and {type(inner).__name__} shows its logits alone; give it "
                "forward_features(x) and forward_head(features, pre_logits=False), as timm's have them"
            )

    def __call__(self, subject: Subject) -> Measured:
        """Details: `margins`, one a class; `points`, [x, y, label, adversarial] each; `classes`, the labels shown."""
        data, device = subject.data, subject.device
        with eval_mode(subject.model), torch.no_grad():
            probs = torch.cat(
                [
                    F.softmax(subject.model(x.to(device).float() / 255), dim=-1).cpu()
                    for x in data.test_images.split(eval_batch_size(device))
                ]
            )
        means = class_means(probs, data.test_labels, data.num_classes)
        generator = torch.Generator().manual_seed(0)
        shown = torch.randperm(data.num_classes, generator=generator)[: self.classes].sort().values
        among = torch.isin(data.test_labels, shown).nonzero().squeeze(1)
        among = among[first_of_each_class(data.test_labels[among], self.images)]
        x, y = data.test_images[among].to(device).float() / 255, data.test_labels[among].to(device)
        epsilon = subject.settings["epsilon"]
        with eval_mode(subject.model):
            keys = sample_keys(0, 0, among.to(device), "structure")
            x_adv = pgd(
                subject.model,
                x,
                lambda z: F.cross_entropy(z, y, reduction="none"),
                norm=subject.settings["norm"],
                epsilon=epsilon,
                step_size=epsilon / 4,
                steps=self.steps,
                start=random_start(x, keys, norm=subject.settings["norm"], epsilon=epsilon),
                validate=False,
            )
            with torch.no_grad():
                network: Any = subject.model
                features = torch.cat(
                    [
                        network.forward_head(network.forward_features(part), pre_logits=True).cpu()
                        for images in (x, x_adv)
                        for part in images.split(eval_batch_size(device))
                    ]
                )
        points = _embedded(features.numpy(), self.perplexity) if rank() == 0 else np.zeros((0, 2))
        labels = y.cpu().repeat(2).tolist()
        return {}, {
            "margins": [round(m, 6) for m in margins(means).tolist()],
            "classes": shown.tolist(),
            "points": [
                [round(float(p[0]), 3), round(float(p[1]), 3), label, int(number >= len(y))]
                for number, (p, label) in enumerate(zip(points, labels, strict=False))
            ],
        }


def class_means(probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean prediction of each class, (C, C): the paper's s-bar_y. probs: (N, C). labels: (N,)."""
    onehot = F.one_hot(labels, num_classes).to(probs.dtype)
    return (onehot.T @ probs) / onehot.sum(0).clamp_min(1)[:, None]


def margins(means: Tensor) -> Tensor:
    """Boundary margin of each class, (C,): s-bar_y[y] - max_{k != y} s-bar_y[k]. Source: Eq. 14. means: (C, C)."""
    own = means.diagonal()
    others = means.masked_fill(torch.eye(len(means), dtype=torch.bool), float("-inf"))
    return own - others.amax(1)


def _embedded(features: np.ndarray[Any, Any], perplexity: float) -> np.ndarray[Any, Any]:
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)


def _place(subject: Subject) -> dict[str, Any]:
    return {
        "folder": subject.folder / "autoattack",
        "device": subject.device,
        "console": subject.console,
    }
