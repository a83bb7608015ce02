"""Second derivatives and torch.func: those of a slow restatement in float64, or one clear error; never a part of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gkl import GKLLoss
from gkl.losses.closed_form import dkl, gkl_loss, ikl, jsd, kl
from gkl.losses.objectives import GKL
from gkl.losses.prior import ClassPrior

EXACT = {"rtol": 1e-9, "atol": 1e-11}
ALPHA, BETA, GAMMA, T, SOFTER = 3.0, 2.0, 0.4, 1.7, 2.3
SETTINGS = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "temperature": T}
Loss = Callable[[Tensor, Tensor], Tensor]


def restated(
    student: Tensor, teacher: Tensor, weights: Tensor, alpha: float, beta: float, gamma: float, temperature: float,
    break_asymmetry: bool = True, pair_weight: float | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 13 by every pair of classes; what no gradient passes is detached."""
    d = teacher - (student if break_asymmetry else student.detach())
    v = weights.detach() ** gamma
    pairs = v[:, :, None] * v[:, None, :]
    each = 0.25 * (pairs * (d[:, :, None] - d[:, None, :]) ** 2).sum((1, 2))
    wmse = each.mean() / (pairs.sum((1, 2)).mean() if pair_weight is None else pair_weight)
    soft = F.softmax(teacher.detach() / temperature, -1)
    return alpha * wmse - beta * (soft * F.log_softmax(student / temperature, -1)).sum(-1).mean()


def inputs(batch: int = 3, classes: int = 4) -> tuple[Tensor, Tensor, ClassPrior, Tensor]:
    """Logits, a prior that is not uniform, labels."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, batch, classes, dtype=torch.float64, generator=draw)
    prior = ClassPrior(classes).double()
    prior.probs.copy_(torch.randn(classes, classes, dtype=torch.float64, generator=draw).softmax(-1))
    prior.table(GAMMA)
    return student, teacher, prior, torch.randint(classes, (batch,), generator=draw)


S, M, PRIOR, LABELS = inputs()
ROWS = PRIOR.probs[LABELS]
LOSSES: dict[str, tuple[Callable[..., Tensor], Loss]] = {
    "class rows": (
        partial(gkl_loss, weights=PRIOR.at(LABELS), **SETTINGS),
        partial(restated, weights=ROWS, **SETTINGS),
    ),
    "weights": (
        partial(gkl_loss, weights=ROWS, **SETTINGS, validate=False),
        partial(restated, weights=ROWS, **SETTINGS),
    ),
    "sample-wise": (
        partial(gkl_loss, weights=None, weights_temperature=SOFTER, **SETTINGS),
        lambda s, t: restated(s, t, (t / SOFTER).softmax(-1), **SETTINGS),
    ),
    "asymmetry kept": (
        partial(gkl_loss, weights=PRIOR.at(LABELS), **SETTINGS, break_asymmetry=False, pair_weight=1.3),
        partial(restated, weights=ROWS, **SETTINGS, break_asymmetry=False, pair_weight=1.3),
    ),
    "dkl": (
        partial(dkl, alpha=ALPHA, beta=BETA),
        lambda s, t: restated(s, t, t.softmax(-1), ALPHA, BETA, 1.0, 1.0, False, 1.0),
    ),
    "ikl": (
        partial(ikl, weights=PRIOR.at(LABELS), alpha=ALPHA, beta=BETA, temperature=T),
        lambda s, t: restated(s, t, ROWS, ALPHA, BETA, 1.0, T, True, 1.0),
    ),
}  # fmt: skip
PLAIN: dict[str, tuple[Loss, Loss]] = {
    "kl": (
        partial(kl, temperature=T),
        lambda s, t: (
            ((t / T).softmax(-1) * ((t / T).log_softmax(-1) - (s / T).log_softmax(-1))).sum(-1).mean()
        ),
    ),
    "jsd": (
        jsd,
        lambda s, t: (
            0.5
            * sum(
                (x.softmax(-1) * (x.log_softmax(-1) - ((s.softmax(-1) + t.softmax(-1)) / 2).log())).sum(-1)
                for x in (s, t)
            ).mean()
        ),
    ),
}
AGAIN = {name: (partial(ours, create_graph=True), slow) for name, (ours, slow) in LOSSES.items()} | PLAIN
UNDER_FUNC = LOSSES | PLAIN


def second(loss: Loss, student: Tensor, teacher: Tensor, scope: str) -> list[Tensor]:
    """Value, gradients, and those of a nonlinear function of the gradients together with a loss that has a second order itself."""
    pair = [
        x.detach().clone().requires_grad_(scope in (n, "both"))
        for x, n in ((student, "student"), (teacher, "teacher"))
    ]
    wanted = [x for x in pair if x.requires_grad]
    value = loss(*pair)
    whole = value + sum(x.exp().sum() for x in wanted)
    first = torch.autograd.grad(whole, wanted, create_graph=True)
    penalty = sum((g.sin() * g).sum() for g in first)
    return [value, *first, *torch.autograd.grad(penalty, wanted)]


@pytest.mark.parametrize("scope", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", AGAIN)
def test_a_gradient_is_differentiated_as_the_equations(name: str, scope: str) -> None:
    ours, slow = AGAIN[name]
    for mine, theirs in zip(second(ours, S, M, scope), second(slow, S, M, scope), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("scope", ["student", "teacher", "both"])
@pytest.mark.parametrize("rows", [1, 1 << 16])
@pytest.mark.parametrize("name", LOSSES)
def test_without_create_graph_a_second_derivative_is_refused(
    name: str, rows: int, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in parts; also where another loss beside it has a second order that would be taken for all of it."""
    monkeypatch.setattr("gkl.losses.parts.CACHED", 4 * rows)
    with pytest.raises(RuntimeError, match="pass create_graph=True to the loss too") as error:
        second(LOSSES[name][0], S, M, scope)
    assert "\n" not in str(error.value)


def test_what_is_made_of_them_refuses_too_and_the_module_takes_it() -> None:
    criterion = GKLLoss(4, **SETTINGS).double()
    criterion.prior.probs.copy_(PRIOR.probs)
    objective = GKL(**SETTINGS)
    for loss in (
        lambda s, t: criterion(s, t, LABELS),
        lambda s, t: objective(s, t, LABELS, PRIOR).mean(),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            second(loss, S, M, "both")
    criterion.create_graph = True
    found = second(lambda s, t: criterion(s, t, LABELS), S, M, "both")
    for mine, theirs in zip(found, second(LOSSES["class rows"][1], S, M, "both"), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("loss", LOSSES)
def test_autograd_functional(loss: str) -> None:
    ours, slow = LOSSES[loss]
    one = torch.autograd.functional
    for mine, theirs in zip(one.jacobian(ours, (S, M)), one.jacobian(slow, (S, M)), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    each = partial(ours, reduction="none")
    for vectorize in (False, True):
        mine = one.jacobian(lambda s: each(s, M), S, vectorize=vectorize)
        assert mine.shape == (3, 3, 4)
        torch.testing.assert_close(mine.sum(0) / 3, one.jacobian(slow, (S, M))[0], **EXACT)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        one.hessian(ours, (S, M))
    for mine, theirs in zip(one.hessian(AGAIN[loss][0], (S, M)), one.hessian(slow, (S, M)), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("name", UNDER_FUNC)
def test_torch_func(name: str) -> None:
    ours, slow = UNDER_FUNC[name]
    draw = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(2, *S.shape, dtype=torch.float64, generator=draw))
    both = (0, 1)
    for transform in (
        lambda f: grad(f, both)(S, M),
        lambda f: jacrev(f, both)(S, M),
        lambda f: jacfwd(f, both)(S, M),
        lambda f: hessian(f, both)(S, M),
        lambda f: jacrev(jacrev(f, both), both)(S, M),
        lambda f: jvp(f, (S, M), tangents),
        lambda f: jvp(grad(f, both), (S, M), tangents),
        lambda f: vjp(f, S, M)[1](torch.tensor(1.5, dtype=torch.float64)),
        lambda f: vmap(grad(f, both))(torch.stack([S, M]), torch.stack([M, S])),
    ):
        mine, theirs = (torch.utils._pytree.tree_leaves(transform(f)) for f in (ours, slow))
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("name", UNDER_FUNC)
def test_forward_mode(name: str) -> None:
    ours, slow = UNDER_FUNC[name]
    found = []
    for loss in (ours, slow):
        with forward_ad.dual_level():
            value = loss(forward_ad.make_dual(S, M), forward_ad.make_dual(M, S))
            found.append(forward_ad.unpack_dual(value))
    torch.testing.assert_close(*(x.tangent for x in found), **EXACT)
    torch.testing.assert_close(*(x.primal for x in found), **EXACT)


def test_gradients_of_each_example_by_vmap() -> None:
    """Labels and masks are mapped over too; the divisor is each example's own."""
    counted = torch.tensor([True, False, True])

    def of_one(student: Tensor, teacher: Tensor, label: Tensor, counts: Tensor) -> Tensor:
        weights = PRIOR.at(label[None])
        return gkl_loss(student[None], teacher[None], weights, counted=counts[None], **SETTINGS)

    found = vmap(grad(of_one))(S, M, LABELS, counted)
    for i in range(3):
        expected = grad(restated)(S[i : i + 1], M[i : i + 1], ROWS[i : i + 1], **SETTINGS)[0]
        torch.testing.assert_close(found[i], expected if counted[i] else torch.zeros_like(expected), **EXACT)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_is_an_error_under_vmap(label: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of (bounds|range)"):
        vmap(lambda s, y: gkl_loss(s[None], s[None], PRIOR.at(y[None]), **SETTINGS))(
            S, torch.tensor([0, label, 1])
        )


def test_what_torch_func_puts_in_the_place_of_the_prior_is_what_counts_and_stays_inside() -> None:
    """functional_call with other buffers, under a transform and mapped over; later calls see the module's own again."""
    student, teacher, prior, labels = inputs()
    criterion = GKLLoss(4, **SETTINGS).double().eval()
    criterion.prior.probs.copy_(prior.probs)
    own = criterion(student, teacher, labels)
    others = torch.stack([prior.probs.flip(0), prior.probs.roll(1, 0)])

    def with_prior(probs: Tensor, student: Tensor) -> Tensor:
        return functional_call(criterion, {"prior.probs": probs}, (student, teacher, labels))

    found = vmap(grad(with_prior, 1), (0, None))(others, student)
    for probs, mine in zip(others, found, strict=True):
        torch.testing.assert_close(mine, grad(restated)(student, teacher, probs[labels], **SETTINGS), **EXACT)
        value = with_prior(probs, student)
        torch.testing.assert_close(value, restated(student, teacher, probs[labels], **SETTINGS), **EXACT)
    assert criterion(student, teacher, labels) == own
    criterion.renew()
    assert criterion(student, teacher, labels) == own


def test_sums_are_not_changed_under_torch_func() -> None:
    criterion = GKLLoss(4, **SETTINGS).double()
    with pytest.raises(RuntimeError, match="GKLLoss in eval mode"):
        grad(lambda s: criterion(s, M, LABELS))(S)
    assert criterion.prior.counts.sum() == 0


SCALARS = {
    "alpha": 3.0, "beta": 2.0, "temperature": 1.7, "pair_weight": 1.3, "gamma": 0.4, "weights_temperature": 2.3,
}  # fmt: skip


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", SCALARS)
def test_a_setting_that_wants_a_gradient_is_refused(name: str, create_graph: bool) -> None:
    """A temperature that is learnt would stay where it is, since none reaches it."""
    settings: dict[str, Any] = SETTINGS | {name: torch.tensor(SCALARS[name], requires_grad=True)}
    with pytest.raises(ValueError, match=rf"{name} must not require a gradient.*{name}\.detach"):
        gkl_loss(S, M, None, create_graph=create_graph, **settings)
    assert gkl_loss(S, M, None, **(settings | {name: torch.tensor(SCALARS[name])})).isfinite()


def test_a_pair_weight_made_of_the_squares_that_wants_a_gradient_is_refused() -> None:
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="pair_weight must not require a gradient"):
        gkl_loss(S, M, None, **SETTINGS, pair_weight=lambda squares: squares.mean() * weight)


@pytest.mark.parametrize("offsets", [(1e4, 1e4), (-1e4, 1e4), (0.0, 1e4)])
def test_the_expression_keeps_the_digits_of_float32_too(offsets: tuple[float, float]) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 100, generator=draw)
    pair = [teacher + 0.3 * torch.randn(64, 100, generator=draw) + offsets[0], teacher + offsets[1]]
    found = []
    for dtype in (torch.float32, torch.float64):
        student, target = (x.to(dtype).requires_grad_() for x in pair)
        value = gkl_loss(student, target, None, alpha=20.0, beta=0.0, gamma=0.4, create_graph=True)
        found.append(torch.autograd.grad(value, (student, target)))
    for single, double in zip(*found, strict=True):
        assert (single.double() - double).norm() <= 4e-7 * double.norm()


@pytest.mark.parametrize("scope", ["student", "teacher", "both"])
def test_compiled_it_is_the_same_or_refused(scope: str) -> None:
    ours, slow = LOSSES["class rows"]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second(compiled, S, M, scope)
    again = torch.compile(partial(ours, create_graph=True), backend="eager", fullgraph=True)
    for mine, theirs in zip(second(again, S, M, scope), second(slow, S, M, scope), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_torch_func_is_compiled_too() -> None:
    ours, slow = LOSSES["class rows"]
    compiled = torch.compile(lambda s, t: grad(ours, (0, 1))(s, t), backend="aot_eager")
    torch.testing.assert_close(compiled(S, M), grad(slow, (0, 1))(S, M), **EXACT)
