"""AutoAttack, the installed `pyautoattack`, made faster, shareable, resumable and checked.

    result = evaluate(model, images, labels, epsilon=8 / 255, folder=Path("autoattack"), device=device)
    result.robust, result.clean                                   # percent

The order of work is the package's own, attack by attack: the images that are still classified correctly, in their order, are
cut into batches of `batch_size`, and each batch is one call of the attack. The package sets its seed anew in each of these calls,
so a batch's outcome follows from its images, the seed and the network alone. Hence what "equal to the stock package" means
here, point by point and on any number of processes:

    AutoAttack(model, norm, eps, seed, version="standard").run_standard_evaluation(x, y, batch_size=batch_size)

with two differences: FAB's projection is computed without sorting (`projection_linf`, the same point up to rounding), and of
fewer than ten classes all the others are targets, where the package would name classes there are not.
On a GPU the attacks' loops are those of `gkl.evaluation.recorded`, whose iterations are replayed with the same bits.
A batch is written when it is finished, so that processes share an attack's batches through the folder, wait there for
each other before the next attack, and a killed evaluation goes on with the next batch. (The package's own state file
cannot be resumed from, see README.) Source: Croce & Hein 2020.

One file, since what the package is made to do and the checks of what it returns belong together.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyautoattack import AutoAttack, fab_base
from pyautoattack.checks import check_square_sr
from torch import Tensor, nn

from gkl.attacks.pgd import Norm, check_radius
from gkl.evaluation.inputs import check_classes, checked
from gkl.evaluation.kept import Kept, digest, fingerprint, looks
from gkl.evaluation.projection import projection_linf
from gkl.evaluation.recorded import Recorded, recordings
from gkl.graphs import Replayed

Version = Literal["standard", "screen"]
# The screen is for development: APGD-CE and APGD-T alone. Its number is never called AutoAttack.
ATTACKS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "screen": ("apgd-ce", "apgd-t")}
# Forward passes that an image costs which withstands the attack, a backward pass counted as one; for the time left alone.
FORWARDS = {"clean": 1, "apgd-ce": 204, "apgd-t": 1818, "fab-t": 2729, "square": 5004}
# The layout of activations and weights while attacked, where it is not the model's own. On a GPU float32 without TF32 has no
# tensor cores to gain from another one.
LAYOUT = {"cpu": torch.channels_last}
FEWEST_CLASSES = 4  # that the targeted DLR loss is defined for
SAME = 0.01  # of the largest logit: how far two looks at an image may lie apart, in half precision and batches of two sizes
LOOKED_AT = 8  # images whose answers tell networks apart that are one by all that can be said of them
TOLERANCE = 1e-5  # of the independent check that adversarial images lie in the ball, in pixel units


@dataclass(frozen=True)
class AutoAttackResult:
    """Accuracies in percent and the flags they come from, in the order of the images given."""

    clean: float
    robust: float
    clean_flags: Tensor
    robust_flags: Tensor
    after: dict[str, float]  # robust accuracy after each attack, percent
    warnings: list[str]
    seconds: float  # of all processes together
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Images attacked."""
        return len(self.robust_flags)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    folder: Path,
    device: torch.device,
    norm: Norm = "linf",
    version: Version = "standard",
    batch_size: int = 200,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[str, float], None] | None = None,
    graph: bool = True,
) -> AutoAttackResult:
    """Attack this process's batches of each attack (number % world_size == rank), wait for the others' and return the result.

    model: in eval mode, images in [0, 1] to logits, at least 4 classes. images: (N, 3, H, W), uint8 or float.
    folder: where finished batches are kept, seen by all processes; those of other networks, data or settings lie beside them
    and are not read. on_progress: called after each batch with where this process is and the seconds it has left, counted as if
    no further image fell. epsilon: pixel units. graph: on a GPU, replay the attacks' iterations from recordings, with the
    same bits.
    Raises ValueError for a model in training mode, with too few classes, without gradient or whose answers differ from look to look, and
    for images outside [0, 1] and labels that are no classes of theirs; RuntimeError if AutoAttack returns an image outside the ball or one it calls misclassified that is not.
    """
    _check_call(version, norm)
    labels = checked(model, images, labels)
    check_radius(norm, epsilon, images[0].numel() if len(images) else None)
    settings = {
        "epsilon": round(epsilon, 12), "norm": norm, "version": version, "seed": seed, "batch_size": batch_size,
        "network": fingerprint(model), "data": digest(images, labels), "device": device.type,
        "pyautoattack": package_version("pyautoattack"), "torch": torch.__version__, "looked_at": LOOKED_AT,
    }  # fmt: skip
    images, labels = images.to(device), labels.to(device)
    robust = torch.ones(len(labels), dtype=torch.bool)
    clean = robust
    share: dict[str, float] = {}
    with _prepared(model, device), recordings(device, graph) as replayed:
        adapted = _Adapter(model, device, replayed)
        num_classes = _classes(adapted, _floats(images[:64]), labels)
        adversary = attacker(adapted, num_classes, epsilon=epsilon, norm=norm, seed=seed, device=device)
        kept = Kept(folder, settings, _seen(adapted, _floats(images[:LOOKED_AT])))
        stages = _Stages(kept, version, rank, world_size, on_progress)
        if replayed is not None:
            Recorded(adapted.network, replayed).take_over(adversary)

        def outcome(attack: str, index: Tensor) -> dict[str, Any]:
            x, y = _floats(images[index.to(device)]), labels[index.to(device)]
            return _clean(adapted, x, y) if attack == "clean" else _attack(attack, adversary, x, y)

        for attack in stages.names:
            points = robust.nonzero().squeeze(1)  # still standing
            robust = stages.carry_out(
                attack, points.split(batch_size) if len(points) else (), robust, outcome
            )
            clean = robust if attack == "clean" else clean
            share[attack] = robust.double().mean().item()
    return _result(stages, clean, robust, share)


def _result(stages: "_Stages", clean: Tensor, robust: Tensor, share: dict[str, float]) -> AutoAttackResult:
    """share: of the images that stand after each stage."""
    with _listening() as heard:
        check_square_sr(share, logger=logging.getLogger("auto-attack"))
    after = {attack: 100.0 * part for attack, part in share.items()}
    return AutoAttackResult(
        clean=after.pop("clean"),
        robust=100.0 * robust.double().mean().item(),
        clean_flags=clean,
        robust_flags=robust,
        after=after,
        warnings=sorted({*heard, *(str(w) for part in stages.found for w in part["warnings"])}),
        seconds=float(sum(part["seconds"] for part in stages.found)),
        versions={"pyautoattack": package_version("pyautoattack"), "torch": torch.__version__},
    )


def _classes(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """How many classes a network tells apart. Raises ValueError for one that AutoAttack's numbers would be nonsense of."""
    with torch.no_grad():
        logits = model(x)
    if logits.ndim != 2 or logits.shape[1] < FEWEST_CLASSES:
        raise ValueError(
            f"AutoAttack's targeted DLR loss needs logits (B, C) of at least {FEWEST_CLASSES} classes, got {tuple(logits.shape)}"
        )
    check_classes(labels, logits)
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the network's logits are not finite numbers: its weights, or its normalisation, are broken"
        )
    if len(x) > 1 and bool((x != x[0]).any()) and bool((logits == logits[0]).all()):
        raise ValueError(
            "the network gives every image the same logits: its weights are not those of a trained one"
        )
    _check_attackable(model, x, logits)
    return int(logits.shape[1])


def _check_attackable(model: nn.Module, x: Tensor, logits: Tensor) -> None:
    """That a second look at some of the images says the same, and has a gradient. Raises ValueError."""
    few, why = x[: max(1, len(x) // 2)].clone().requires_grad_(), "no_grad or detach in its forward?"
    with torch.enable_grad():
        again = model(few)
        try:
            known = (
                again.requires_grad
                and torch.autograd.grad(again.sum(), few, allow_unused=True)[0] is not None
            )
        except RuntimeError as error:
            known, why = False, str(error).partition(":")[0]
    if not known:
        raise ValueError(
            f"the network's logits have no gradient to its images ({why}), which AutoAttack climbs"
        )
    if float((again.detach() - logits[: len(few)]).abs().max()) > SAME * float(logits.abs().max()):
        raise ValueError(
            "the network says something else of the same images at a second look, in a smaller batch: it draws at random in eval mode "
            "(F.dropout without training=self.training?) or normalises by the batch; AutoAttack's number would mean nothing"
        )


def _seen(model: nn.Module, x: Tensor) -> Tensor:
    """What a network answers, and what the attacks climb."""
    with torch.enable_grad():
        logits = model(x.requires_grad_())
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return looks(logits, gradient)


def _check_call(version: str, norm: str) -> None:
    if version not in ATTACKS or norm not in ("linf", "l2"):
        raise ValueError(
            f"version must be {' or '.join(ATTACKS)} and norm linf or l2, got {version!r} and {norm!r}"
        )


class _Stages:
    """The clean look and the attacks one after the other, each one's batches shared by the processes."""

    def __init__(
        self,
        kept: Kept,
        version: Version,
        rank: int,
        world_size: int,
        on_progress: Callable[[str, float], None] | None,
    ) -> None:
        self.kept, self.rank, self.world_size, self.on_progress = kept, rank, world_size, on_progress
        self.names = ("clean", *ATTACKS[version])
        self.found: list[dict[str, Any]] = []  # every batch, of all processes
        self.spent, self.passes = 0.0, 0.0  # seconds and forward passes of this process

    def carry_out(
        self,
        attack: str,
        batches: Sequence[Tensor],
        robust: Tensor,
        outcome: Callable[[str, Tensor], dict[str, Any]],
    ) -> Tensor:
        """Attack this process's batches, wait for the others'; returns which images withstand, (N,) bool. robust: those before."""
        mine = range(self.rank, len(batches), self.world_size)
        for number in mine:
            if self.kept.read(attack, number, batches[number]) is not None:
                continue
            started = time.monotonic()
            made = outcome(attack, batches[number])
            seconds = time.monotonic() - started
            self.kept.write(attack, number, batches[number], made, seconds)
            self.spent, self.passes = (
                self.spent + seconds,
                self.passes + FORWARDS[attack] * len(batches[number]),
            )
            if self.on_progress:
                left = self._left(
                    attack, [len(batches[other]) for other in mine if other > number], int(robust.sum())
                )
                self.on_progress(f"{attack}, batch {number + 1} of {len(batches)}", left)
        parts = [self.kept.awaited(attack, number, batch) for number, batch in enumerate(batches)]
        robust = robust.clone()
        for batch, part in zip(batches, parts, strict=True):
            robust[batch] = torch.from_numpy(part["robust"])
        self.found += parts
        return robust

    def _left(self, attack: str, ahead: Sequence[int], standing: int) -> float:
        """Seconds that this process has left, if no further image falls. ahead: sizes of its batches to come in this attack."""
        later = sum(FORWARDS[name] for name in self.names[self.names.index(attack) + 1 :])
        return self.spent / self.passes * (FORWARDS[attack] * sum(ahead) + later * standing / self.world_size)


def attacker(
    model: nn.Module, num_classes: int, *, epsilon: float, norm: Norm, seed: int, device: torch.device
) -> AutoAttack:
    """The package's AutoAttack with what its "standard" sets, and as many target classes as there are."""
    adversary = AutoAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=seed, version="custom", attacks=[],
        device=device,
    )  # fmt: skip
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(9, num_classes - 1)
    return adversary


def _clean(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The same of no attack at all."""
    with torch.no_grad():
        right = model(x).argmax(-1) == y
    return {
        "robust": right.cpu().numpy(),
        "x_adv": x[:0].cpu().numpy(),
        "warnings": np.array([], dtype=np.str_),
    }


def _floats(images: Tensor) -> Tensor:
    """uint8 or float images as contiguous float32 in [0, 1]."""
    return (images.float() / 255 if images.dtype == torch.uint8 else images.float()).contiguous()


def _attack(attack: str, adversary: AutoAttack, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One attack on one batch: which images withstand it, the images that make the others fall, what was warned of.

    The images are looked at without AutoAttack: in the ball, in [0, 1], misclassified where it says so and nowhere else.
    """
    with torch.no_grad():
        right = adversary.model(x).argmax(-1) == y
    adversary.attacks_to_run = [attack]
    with _listening() as heard:
        x_adv, predicted = adversary.run_standard_evaluation(x, y, batch_size=len(y))
    robust = predicted == y
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if adversary.norm == "Linf" else delta.norm(dim=1)
    if not bool((size <= adversary.epsilon + TOLERANCE).all()):
        raise RuntimeError(
            f"AutoAttack returned an image {size.max().item():.6f} away, epsilon is {adversary.epsilon:.6f}"
        )
    if x_adv.isnan().any() or x_adv.min() < 0 or x_adv.max() > 1:
        raise RuntimeError("AutoAttack returned pixels outside [0, 1]")
    with torch.no_grad():
        own = adversary.model(x_adv).argmax(-1) == y
    if not own.equal(robust) or bool((robust & ~right).any()):
        raise RuntimeError(
            f"AutoAttack counts {int(robust.sum())} robust images of {len(y)}, its own images give {int((own & right).sum())}"
        )
    return {
        "robust": robust.cpu().numpy(),
        "x_adv": x_adv[~robust].cpu().numpy(),
        "warnings": np.array(heard, dtype=np.str_),
    }


class _Adapter(nn.Module):
    """The model as AutoAttack is to see it: contiguous images in, contiguous gradients out, whatever the layout between them.

    The package's zero-gradient check fails on gradients in channels_last.
    """

    def __init__(self, model: nn.Module, device: torch.device, replayed: Replayed | None = None) -> None:
        """replayed: what replays a forward pass alone."""
        super().__init__()
        self.model, self.layout = model, LAYOUT.get(device.type, torch.preserve_format)
        self.replayed = replayed

    def forward(self, x: Tensor) -> Tensor:
        """Logits, the caller's to change."""
        if self.replayed is None or (torch.is_grad_enabled() and x.requires_grad):
            return self.network(x)
        with torch.no_grad():
            return self.replayed("logits", self.network, (x,)).clone()

    def network(self, x: Tensor) -> Tensor:
        """The same, nothing replayed."""
        return self.model(_ContiguousGradient.apply(x).to(memory_format=self.layout))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what the package warns of and print none of what it logs; the tracer it removes is put back."""
    heard: list[str] = []

    class Collect(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            heard.append(entry.getMessage())

    logger, handler, tracer = logging.getLogger("auto-attack"), Collect(), sys.gettrace()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        sys.settrace(tracer)


@contextmanager
def _prepared(model: nn.Module, device: torch.device) -> Iterator[None]:
    """float32 without TF32, parameters frozen and in LAYOUT, FAB with our projection; model, package and random state end as
    they were."""
    layout = LAYOUT.get(device.type, torch.preserve_format)
    parameters = [(p, p.requires_grad, p.data) for p in model.parameters()]
    projection = fab_base.projection_linf
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        fab_base.projection_linf = projection_linf
        for p, _, data in parameters:
            p.requires_grad_(False)
            p.data = data.to(memory_format=layout) if data.ndim == 4 else data
        try:
            yield
        finally:
            fab_base.projection_linf = projection
            for p, wanted, data in parameters:
                p.data = data
                p.requires_grad_(wanted)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
