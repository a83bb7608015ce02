"""Figure 2: which logits each term of KL, DKL and GKL reaches, and with how large a gradient, measured on random logits."""

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gkl.losses import dkl, gkl_loss, kl
from trainers.reports.figures import BLACK, BLUE, RED
from trainers.reports.tables import Table

PAIRS, CLASSES, GAMMA = 512, 100, 0.4
# A loss's terms by name, each of (student, teacher, class-wise weights); alpha = beta = 1, so that DKL's are KL's (Theorem 1).
Term = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, dict[str, Term]] = {
    "KL": {"KL": lambda s, t, w: kl(s, t)},
    "DKL": {
        "wMSE": lambda s, t, w: dkl(s, t, alpha=1.0, beta=0.0),
        "CE": lambda s, t, w: dkl(s, t, alpha=0.0, beta=1.0),
    },
    "GKL": {
        "wMSE": lambda s, t, w: gkl_loss(s, t, w, alpha=1.0, beta=0.0, gamma=GAMMA),
        "CE": lambda s, t, w: gkl_loss(s, t, w, alpha=0.0, beta=1.0, gamma=GAMMA),
    },
}
COLOURS = {"KL": BLACK, "wMSE": BLUE, "CE": RED}
SIDES = ("student", "teacher")


def norms() -> dict[str, dict[str, dict[str, float]]]:
    """Loss -> term -> side -> mean over the pairs of the Euclidean norm of the gradient of its logits, in float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(PAIRS) % CLASSES
    teacher = 2 * torch.randn(PAIRS, CLASSES, generator=generator, dtype=torch.float64)
    teacher[torch.arange(PAIRS), labels] += 5.0  # a network that has learnt something
    student = teacher + torch.randn(PAIRS, CLASSES, generator=generator, dtype=torch.float64)
    sums = torch.zeros(CLASSES, CLASSES, dtype=torch.float64).index_add_(0, labels, teacher.softmax(-1))
    weights = (sums / sums.sum(-1, keepdim=True))[labels]  # (PAIRS, CLASSES), class-wise
    found: dict[str, dict[str, dict[str, float]]] = {}
    for loss, terms in LOSSES.items():
        for name, term in terms.items():
            sides = [x.clone().requires_grad_() for x in (student, teacher)]
            gradients = torch.autograd.grad(
                PAIRS * term(sides[0], sides[1], weights), sides, allow_unused=True
            )
            each = [0.0 if g is None else g.norm(dim=-1).mean().item() for g in gradients]
            found.setdefault(loss, {})[name] = dict(zip(SIDES, each, strict=True))
    return found


def gradient_paths(table: Table) -> Figure:
    """A panel for each loss: solid arrows forwards, dotted ones backwards with the size of what they carry."""
    figure = Figure(figsize=(10.8, 4.0), layout="constrained")
    for axes, (loss, terms) in zip(figure.subplots(1, len(LOSSES)), norms().items(), strict=True):
        _panel(axes, loss, terms)
    figure.suptitle(
        f"{table.title}\ndotted: mean norm of the gradient of a pair's logits; {PAIRS} random pairs, {CLASSES} classes, "
        f"α = β = 1, GKL's weights class-wise, γ = {GAMMA}, normalised as in Algorithm 1",
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, loss: str, terms: dict[str, dict[str, float]]) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1), title=loss)
    axes.axis("off")
    logits = {"teacher": (0.5, 0.82), "student": (0.5, 0.18)}
    for side, symbol in (("teacher", "m"), ("student", "n")):
        height = logits[side][1]
        for x, text in ((0.06, f"$x_{symbol}$"), (0.26, side), (0.5, f"$o_{symbol}$")):
            _box(axes, (x, height), text, BLACK)
        for start, end in ((0.1, 0.15), (0.37, 0.45)):
            axes.annotate("", (end, height), (start, height), arrowprops={"arrowstyle": "->"})
    places = {
        name: (0.9, y) for name, y in zip(terms, (0.5,) if len(terms) == 1 else (0.68, 0.32), strict=True)
    }
    for name, sides in terms.items():
        _box(axes, places[name], name, COLOURS[name])
        for side, size in sides.items():
            x, y = logits[side]
            arrow: dict[str, Any] = {"arrowstyle": "->", "color": "lightgrey", "shrinkA": 14, "shrinkB": 14}
            axes.annotate("", places[name], (x, y), arrowprops=arrow)
            if size > 0:
                back = {**arrow, "color": COLOURS[name], "linestyle": ":", "connectionstyle": "arc3,rad=0.25"}
                axes.annotate("", (x, y), places[name], arrowprops=back)
                (left, low), across, up = places[name], x - places[name][0], y - places[name][1]
                beside = left + across / 2 + 0.2 * up, low + up / 2 - 0.2 * across  # outside of the arc
                axes.text(*beside, f"{size:.3f}", color=COLOURS[name], fontsize=8, ha="center", va="center")


def _box(axes: Axes, place: tuple[float, float], text: str, colour: str) -> None:
    axes.text(*place, text, ha="center", va="center", color=colour, fontsize=9,
              bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": colour})  # fmt: skip
