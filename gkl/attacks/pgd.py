"""Inner maximisation: projected gradient ascent on any loss, and how its budget grows over training.

    attack = PGD(norm="linf", epsilon=8 / 255, ramp=True, phases="executed")
    budget = attack.budget(epoch, epochs)
    x_adv = pgd(model, x, lambda logits: kl(logits, clean_logits), norm="linf", start=x + 1e-3 * noise, **budget)

The attack sees a function from images to logits and a loss: mode, gradients and buffers of a model are the caller's.
Source: Madry et al. 2018 (PGD), Zhang et al. 2019 (TRADES' start), arXiv 2503.08038 Sec. 4.1 (the ramp).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from gkl.losses.inputs import transformed
from gkl.rng import normal, uniform

Norm = Literal["linf", "l2"]
ROUNDING = 1e-4  # that a picture which was normalised and is so no more may lie outside [0, 1]


def pgd(
    logits_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    norm: Norm,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    steps: int | Tensor,
    start: Tensor,
    validate: bool = True,
) -> Tensor:
    """Images within epsilon of x (in `norm`) and in [0, 1] that raise loss_fn(logits_fn(.)), detached.

    x, start: (B, ...) images, x in [0, 1]; start may lie outside, it is projected after the first step.
    loss_fn: logits to any number of values, their sum is maximised. epsilon, step_size: pixel units (8/255).
    epsilon, step_size, steps may be (B, 1, 1, 1): each image its own budget.
    linf takes steps of the gradient's sign, l2 of the normalised gradient; projection as each norm needs.
    validate: False skips the look at the images' values, which on a GPU waits for the device; torch.func and torch.compile skip it too.
    Raises ValueError for images outside [0, 1], an epsilon within which any becomes any other, and logits without gradient to them.
    """
    if not isinstance(epsilon, Tensor) and epsilon != 0.0:
        check_radius(norm, epsilon, x[0].numel() if len(x) else None)
    if validate and not (torch.compiler.is_compiling() or transformed()):
        _check_values(x)
    x_adv = start.detach()
    for number in range(int(steps.max()) if isinstance(steps, Tensor) else steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            loss = loss_fn(logits_fn(x_adv)).sum()
            if not loss.requires_grad:
                raise ValueError(
                    "the loss has no gradient to the images: leave out no_grad, inference_mode or detach on the way there"
                )
            (grad,) = torch.autograd.grad(loss, x_adv)
        ascent = grad.sign() if norm == "linf" else grad / _norms(grad).clamp_min(1e-12)
        x_adv = x_adv.detach()
        moved = project(x_adv + step_size * ascent, x, norm=norm, epsilon=epsilon)
        x_adv = torch.where(number < steps, moved, x_adv) if isinstance(steps, Tensor) else moved
    return x_adv.detach()


def _check_values(x: Tensor) -> None:
    """Raises ValueError for pictures that are normalised or in 0..255: they would be clamped, and not attacked."""
    low, high = (float(value) for value in x.detach().aminmax()) if x.numel() else (0.0, 1.0)
    if not x.is_floating_point() or not (-ROUNDING <= low and high <= 1.0 + ROUNDING):  # NaN, too
        raise ValueError(
            f"images must be float in [0, 1], got {x.dtype} from {low:g} to {high:g}; divide those of 0 to 255 by 255, and put a "
            "normalisation into the network"
        )


def random_start(x: Tensor, keys: Tensor, *, norm: Norm, epsilon: float) -> Tensor:
    """A point of the epsilon-ball around x and of [0, 1]: uniform (linf), on its sphere (l2). keys: (B,), gkl.rng."""
    if norm == "linf":
        noise = 2 * uniform(keys, x[0].numel()).view_as(x).to(x.dtype) - 1
    else:
        noise = normal(keys, tuple(x.shape[1:]), x.dtype)
    return project(x + epsilon * noise, x, norm=norm, epsilon=epsilon)


def project(x_adv: Tensor, x: Tensor, *, norm: Norm, epsilon: float | Tensor) -> Tensor:
    """The images moved into the epsilon-ball around x and into [0, 1]. x_adv, x: (B, ...)."""
    if norm == "linf":
        return torch.clamp(x_adv, x - epsilon, x + epsilon).clamp(0.0, 1.0)
    if norm == "l2":
        # The box first: shrinking a difference towards x, itself in the box, does not leave it again.
        delta = x_adv.clamp(0.0, 1.0) - x
        return x + delta * (epsilon / _norms(delta).clamp_min(1e-12)).clamp_max(1.0)
    raise ValueError(f"norm must be linf or l2, got {norm!r}")


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each example, (B, 1, ..., 1)."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def check_radius(norm: str, epsilon: float, numbers: int | None = None, name: str = "epsilon") -> None:
    """Raises ValueError for a radius that is none, or within which every picture can become any other.

    numbers: of a picture, 3 H W, None where they are not known yet.
    """
    longest = 1.0 if norm == "linf" else math.sqrt(numbers) if numbers else math.inf
    if not 0.0 < epsilon <= longest or math.isinf(epsilon):  # NaN, too
        most = (
            ""
            if math.isinf(longest)
            else f" and at most {longest:.4g}, which is from any picture to any other"
        )
        hint = f"; {epsilon:g} levels of 255 are {epsilon / 255:.4g}" if epsilon > 1.0 else ""
        raise ValueError(f"{name} must be above 0{most} in {norm}, got {epsilon:g}{hint}")


def doubtful(norm: str, epsilon: float, name: str = "epsilon") -> str | None:
    """A line on a radius that is the other norm's: it gives a number, and most likely of another question."""
    levels = 255.0 * epsilon
    if norm == "l2" and abs(levels - round(levels)) < 1e-6 and 1 <= round(levels) <= 16:
        return (
            f"{name} is {levels:.0f}/255 in l2, a radius of linf: in l2 it moves a picture hardly at all, and published are 0.5 on CIFAR "
            f"and 3 on ImageNet; set {name}=0.5, or norm=linf"
        )
    if norm == "linf" and epsilon >= 0.5:
        return f"{name} is {epsilon:g} in linf, within which every picture may become the same grey; set {name} to 8/255, 0.03137, or norm=l2"
    return None


class Budget(TypedDict):
    """What an epoch's attack may do: epsilon and step_size in pixel units."""

    epsilon: float
    step_size: float
    steps: int


@dataclass(frozen=True)
class Phase:
    """Until this share of the epochs: so many steps, each `step_size` times the epoch's epsilon."""

    until: float
    steps: int
    step_size: float


PHASES: dict[str, tuple[Phase, ...]] = {
    # The authors' "high" budget as it runs: four independent ifs, of which the last always wins.
    "executed": (Phase(1.0, steps=5, step_size=1 / 2),),
    # The same as it is spelled out: 3.5 steps on average.
    "intended": (
        Phase(0.25, steps=2, step_size=1.0),
        Phase(0.5, steps=3, step_size=2 / 3),
        Phase(0.75, steps=4, step_size=1 / 2),
        Phase(1.0, steps=5, step_size=1 / 2),
    ),
    "low": (Phase(1.0, steps=2, step_size=1.0),),
    "ten": (Phase(1.0, steps=10, step_size=1 / 4),),  # 2/255 in a ball of 8/255
    "lbgat": (Phase(1.0, steps=10, step_size=0.007 / 0.031),),
}


@dataclass(frozen=True)
class PGD:
    """The training attack: threat model, start, and the budget of each epoch.

    epsilon: pixel units, reached in the last epoch when `ramp`, from the first otherwise.
    start_std: standard deviation of the Gaussian start around x, in pixel units (TRADES: 0.001); None starts anywhere
    in the ball.
    phases: a name in PHASES.
    mode: what the attacked network's batch norm does. eval: running statistics; frozen: normalises by the batch and
    leaves its running statistics alone (DM-AT); train: they follow the attack's images (Rice et al., AT-AWP).
    """

    norm: Norm
    epsilon: float
    ramp: bool
    phases: str
    start_std: float | None = 0.001
    mode: Literal["eval", "frozen", "train"] = "eval"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"attack.norm must be linf or l2, got {self.norm!r}")
        check_radius(self.norm, self.epsilon, name="attack.epsilon")
        if self.start_std is not None and not self.start_std >= 0.0:
            raise ValueError(f"attack.start_std must be at least 0, got {self.start_std}")
        if self.phases not in PHASES:
            raise ValueError(f"attack.phases must be one of {', '.join(PHASES)}, got {self.phases!r}")
        if self.mode not in ("eval", "frozen", "train"):
            raise ValueError(f"attack.mode must be eval, frozen or train, got {self.mode!r}")

    def budget(self, epoch: int, epochs: int) -> Budget:
        """The budget of epoch 1..epochs. A phase ends with the last epoch <= int(until * epochs)."""
        epsilon = self.epsilon * (epoch / epochs if self.ramp else 1.0)
        phase = next(phase for phase in PHASES[self.phases] if epoch <= int(phase.until * epochs))
        return Budget(epsilon=epsilon, step_size=phase.step_size * epsilon, steps=phase.steps)

    def start(self, x: Tensor, keys: Tensor) -> Tensor:
        """Where the ascent from x begins. keys: (B,) from gkl.rng."""
        if self.start_std is None:
            return random_start(x, keys, norm=self.norm, epsilon=self.epsilon)
        return x + self.start_std * normal(keys, tuple(x.shape[1:]), x.dtype)
