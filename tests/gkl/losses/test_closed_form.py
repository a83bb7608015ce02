"""The losses against slow restatements of their equations in float64, and against their gradient identities."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkl.losses.closed_form import dkl, gkl, ikl, jsd, kl, mean_pair_weight, smooth
from gkl.losses.gradients import SampleWise

EXACT = {"rtol": 1e-11, "atol": 1e-13}


def logits(batch: int = 5, classes: int = 7, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = scale * torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def probabilities(batch: int, classes: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.softmax(2 * torch.randn(batch, classes, dtype=torch.float64, generator=generator), -1)


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(value, inputs, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True))


# --- slow restatements ------------------------------------------------------------------------------------------------


def algorithm1(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float = 1.0,
) -> Tensor:
    """Algorithm 1 of the paper with every pair of classes; its typo Delta_n - Delta_a read as Delta_m - Delta_n."""
    delta_m = teacher[:, :, None] - teacher[:, None, :]
    delta_n = student[:, :, None] - student[:, None, :]
    pairs = weights[:, :, None] ** gamma * weights[:, None, :] ** gamma
    wmse = 0.25 * (pairs * (delta_m - delta_n) ** 2).sum() / pairs.sum()
    soft = F.softmax(teacher.detach() / temperature, -1)
    return alpha * wmse - beta * (soft * F.log_softmax(student / temperature, -1)).sum(-1).mean()


def algorithm2_wmse(student: Tensor, teacher: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """The wMSE of the paper's "memory-efficient" Algorithm 2 as it is printed."""
    w, d = weights**gamma, teacher - student
    expanded = 2 * (w * d**2).sum() - 2 * ((w * d).sum(-1) ** 2).sum()
    return 0.25 * expanded / (w**2).sum()


# --- value and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_closed_form_is_algorithm_1(gamma: float, classes: int, temperature: float) -> None:
    student, teacher = logits(6, classes)
    weights = probabilities(6, classes)
    ours = gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=gamma, temperature=temperature)
    slow = algorithm1(student, teacher, weights, 20.0, 4.0, gamma, temperature)
    torch.testing.assert_close(ours, slow, **EXACT)
    for mine, theirs in zip(
        gradients(ours, student, teacher), gradients(slow, student, teacher), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_equation_18_as_corrected() -> None:
    """d/do_n of GKL: minus the weighted differences, plus beta (s_n - s_m): beta multiplies both terms."""
    alpha, beta, gamma = 20.0, 3.0, 0.4
    student, teacher = logits()
    weights = probabilities(5, 7)
    value = gkl(student, teacher, weights, alpha=alpha, beta=beta, gamma=gamma, reduction="none").sum()
    to_student, to_teacher = gradients(value, student, teacher)
    v, d = weights**gamma, (teacher - student).detach()
    pull = torch.zeros_like(d)
    for i in range(5):
        for j in range(7):
            for k in range(7):
                pull[i, j] += v[i, j] * v[i, k] * (d[i, j] - d[i, k])
    pull *= alpha / (v.sum(-1) ** 2).mean()
    torch.testing.assert_close(to_teacher, pull, **EXACT)
    soft_student, soft_teacher = F.softmax(student, -1), F.softmax(teacher, -1)
    torch.testing.assert_close(to_student, -pull + beta * (soft_student - soft_teacher), **EXACT)
    printed = -pull + beta * soft_student - soft_teacher
    assert (to_student - printed).abs().max() > 0.1


def test_theorem_1_dkl_has_the_gradients_of_kl() -> None:
    student, teacher = logits()
    ours = gradients(dkl(student, teacher, reduction="none").sum(), student, teacher)
    theirs = gradients(kl(student, teacher, reduction="none").sum(), student, teacher)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    assert (
        abs(dkl(student, teacher) - kl(student, teacher)) > 0.1
    )  # the values are not the same, and need not be


def test_dkl_sends_wmse_to_the_teacher_and_the_cross_entropy_to_the_student() -> None:
    student, teacher = logits()
    wmse = gradients(dkl(student, teacher, alpha=1.0, beta=0.0), student, teacher)
    entropy = gradients(dkl(student, teacher, alpha=0.0, beta=1.0), student, teacher)
    assert wmse[0].count_nonzero() == 0 and wmse[1].abs().max() > 1e-3
    assert entropy[1].count_nonzero() == 0 and entropy[0].abs().max() > 1e-3


def test_breaking_the_asymmetry_adds_wmse_to_the_student_and_changes_no_value() -> None:
    student, teacher = logits()
    weights = probabilities(5, 7)
    kept = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
    broken = gkl(student, teacher, weights, **kept)
    whole = gkl(student, teacher, weights, break_asymmetry=False, **kept)
    torch.testing.assert_close(broken, whole, **EXACT)
    (student_broken, teacher_broken), (student_whole, teacher_whole) = (
        gradients(value, student, teacher) for value in (broken, whole)
    )
    torch.testing.assert_close(teacher_broken, teacher_whole, **EXACT)
    torch.testing.assert_close(student_whole - student_broken, teacher_whole, **EXACT)


def test_algorithm_2_as_printed_is_another_loss() -> None:
    student, teacher = logits(32, 100, scale=2.0)
    for gamma in (0.4, 1.0):
        weights = probabilities(32, 100)
        ours = gkl(student, teacher, weights, alpha=1.0, beta=0.0, gamma=gamma)
        printed = algorithm2_wmse(student, teacher, weights, gamma)
        assert not math.isclose(ours.item(), printed.item(), rel_tol=0.5), (gamma, ours, printed)


def test_gamma_is_a_temperature_of_sample_wise_weights() -> None:
    """softmax(o) ** gamma, normalised, is softmax(gamma o); of a class mean it is not."""
    _, teacher = logits()
    soft = F.softmax(teacher, -1).detach()
    powered = smooth(soft, 0.4)
    torch.testing.assert_close(
        powered / powered.sum(-1, keepdim=True), F.softmax(0.4 * teacher, -1).detach(), **EXACT
    )
    mean = smooth(soft.mean(0, keepdim=True), 0.4)
    tempered = F.softmax(0.4 * teacher, -1).detach().mean(0, keepdim=True)
    assert (mean / mean.sum() - tempered).abs().max() > 1e-3


def test_ikl_is_the_conference_form() -> None:
    """gamma 1, weights that sum to one, wMSE averaged over the batch and nothing else."""
    student, teacher = logits()
    weights = probabilities(5, 7)
    d = teacher - student
    pairs = weights[:, :, None] * weights[:, None, :] * (d[:, :, None] - d[:, None, :]) ** 2
    soft = F.softmax(teacher.detach() / 2.0, -1)
    slow = 20.0 * 0.25 * pairs.sum((1, 2)) - 4.0 * (soft * F.log_softmax(student / 2.0, -1)).sum(-1)
    ours = ikl(student, teacher, weights, alpha=20.0, beta=4.0, temperature=2.0, reduction="none")
    torch.testing.assert_close(ours, slow, **EXACT)
    torch.testing.assert_close(
        ours.mean(), gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=1.0, temperature=2.0), **EXACT
    )


def test_kl_and_jsd_are_their_definitions() -> None:
    student, teacher = logits()
    p, q = F.softmax(teacher, -1), F.softmax(student, -1)
    torch.testing.assert_close(kl(student, teacher), (p * (p / q).log()).sum(-1).mean(), **EXACT)
    m = (p + q) / 2
    slow = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))
    torch.testing.assert_close(jsd(student, teacher, reduction="none"), slow, **EXACT)
    torch.testing.assert_close(jsd(student, teacher), jsd(teacher, student), **EXACT)
    # Eq. 16 with the factor 1/2 that its printing lacks.
    (grad,) = gradients(jsd(student, teacher, reduction="none").sum(), student)
    ratio = (q / m).log().detach()
    torch.testing.assert_close(grad, 0.5 * q * (ratio - (q * ratio).sum(-1, keepdim=True)), **EXACT)
    far = torch.tensor([[500.0, -500.0]], dtype=torch.float64)
    assert math.isclose(jsd(far, -far).item(), math.log(2.0), rel_tol=1e-12)


@pytest.mark.parametrize("break_asymmetry", [True, False])
def test_gradcheck(break_asymmetry: bool) -> None:
    """Against finite differences, where autograd's own detachments leave something to compare: the sum of both."""
    student, teacher = logits(3, 4, scale=1.0)
    weights = probabilities(3, 4)

    def wmse(s: Tensor, t: Tensor) -> Tensor:
        return gkl(s, t, weights, alpha=3.0, beta=0.0, gamma=0.4, reduction="none")

    def entropy(s: Tensor) -> Tensor:
        return gkl(
            s, teacher.detach(), weights, alpha=0.0, beta=2.0, gamma=0.4, temperature=1.7,
            break_asymmetry=break_asymmetry, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(wmse, (student, teacher))
    assert torch.autograd.gradcheck(entropy, (student,))
    assert torch.autograd.gradcheck(
        lambda s, t: kl(s, t, temperature=2.0, reduction="none"), (student, teacher)
    )
    assert torch.autograd.gradcheck(lambda s, t: jsd(s, t, reduction="none"), (student, teacher))


def test_no_gradient_reaches_the_weights() -> None:
    student, teacher = logits()
    weights = probabilities(5, 7).requires_grad_()
    gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4).backward()
    assert weights.grad is None


# --- invariances ------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 4), st.integers(2, 9))
alphas = st.floats(0.0, 30.0)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 999), alphas, st.floats(0, 1), st.floats(-50, 50), st.floats(-50, 50))
def test_shifts_change_nothing(
    shape: tuple[int, int], seed: int, alpha: float, gamma: float, by_student: float, by_teacher: float
) -> None:
    student, teacher = (x.detach() for x in logits(*shape, seed=seed))
    weights = probabilities(*shape, seed=seed)
    options = {"alpha": alpha, "beta": 1.0, "gamma": gamma, "reduction": "none"}
    torch.testing.assert_close(
        gkl(student + by_student, teacher + by_teacher, weights, **options),
        gkl(student, teacher, weights, **options),
        rtol=1e-9,
        atol=1e-9,
    )


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 999), st.floats(0, 1))
def test_classes_and_samples_may_be_renamed(shape: tuple[int, int], seed: int, gamma: float) -> None:
    student, teacher = (x.detach() for x in logits(*shape, seed=seed))
    weights = probabilities(*shape, seed=seed)
    options = {"alpha": 20.0, "beta": 4.0, "gamma": gamma, "reduction": "none"}
    generator = torch.Generator().manual_seed(seed)
    classes, samples = (torch.randperm(n, generator=generator) for n in (shape[1], shape[0]))
    value = gkl(student, teacher, weights, **options)
    torch.testing.assert_close(
        gkl(student[:, classes], teacher[:, classes], weights[:, classes], **options), value, **EXACT
    )
    torch.testing.assert_close(
        gkl(student[samples], teacher[samples], weights[samples], **options), value[samples], **EXACT
    )
    # Slices of a batch with the whole batch's divisor are the slices of the whole batch's values.
    divisor = mean_pair_weight(weights, gamma)
    torch.testing.assert_close(
        gkl(student[:1], teacher[:1], weights[:1], pair_weight=divisor, **options), value[:1], **EXACT
    )


# --- float32, half precision, autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_float32_with_large_offsets(offset: float) -> None:
    """The two logits carry a common offset; what float32 keeps of them is the reference's input."""
    student, teacher = (x.detach() for x in logits(64, 100))
    weights = probabilities(64, 100)
    single = [(x + offset).float().requires_grad_() for x in (student, teacher)]
    double = [x.detach().double().requires_grad_() for x in single]
    options = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
    value, reference = gkl(*single, weights.float(), **options), algorithm1(*double, weights, 20.0, 4.0, 0.4)
    torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=0)
    for mine, theirs in zip(gradients(value, *single), gradients(reference, *double), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (x.detach().to(dtype) for x in logits(8, 10))
    weights = probabilities(8, 10).float()
    options = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
    expected = gkl(student.float(), teacher.float(), weights, **options)
    assert gkl(student, teacher, weights, **options).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert gkl(student, teacher, weights, **options).equal(expected)
        assert kl(student, teacher).equal(kl(student.float(), teacher.float()))
        assert jsd(student, teacher).equal(jsd(student.float(), teacher.float()))


def test_extreme_weights_and_logits_stay_finite() -> None:
    student = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-80.0, 80.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    for gamma in (0.0, 0.4, 1.0):
        value = gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=gamma)
        assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, student, teacher))


def test_memory_is_linear_in_the_classes() -> None:
    """Nothing of size B C C is ever saved: what backward keeps is two tensors of the logits' size."""
    student, teacher = torch.randn(4, 5000, requires_grad=True), torch.randn(4, 5000, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = gkl(student, teacher, F.softmax(teacher.detach(), -1), alpha=20.0, beta=4.0, gamma=0.4)
    assert 0 < sum(t.numel() for t in saved) < 2.1 * student.numel()
    value.backward()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(2, 4)}, r"must both be \(B, C\).*\(2, 4\).*\(2, 3\)"),
        ({"student_logits": torch.zeros(2, 1), "teacher_logits": torch.zeros(2, 1)}, "C >= 2"),
        ({"student_logits": torch.zeros(2, 3, 4), "teacher_logits": torch.zeros(2, 3, 4)}, "flatten"),
        ({"weights": torch.full((1, 3), 1 / 3)}, r"weights of the logits' shape \(2, 3\), got \(1, 3\)"),
        ({"weights": torch.ones(2, 3)}, r"must be probabilities.*row sums 3\.\.3"),
        ({"weights": torch.tensor([[1.5, -0.5, 0.0]] * 2)}, "smallest entry -0.5"),
        ({"weights": torch.full((2, 3), float("nan"))}, "must be probabilities"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\]"),
        ({"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict, message: str) -> None:
    arguments = {
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "weights": torch.full((2, 3), 1 / 3),
        "alpha": 1.0,
        "beta": 1.0,
        "gamma": 0.5,
    }
    with pytest.raises(ValueError, match=message) as error:
        gkl(**{**arguments, **change})
    assert "\n" not in str(error.value)


# --- how it is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("scope", ["student", "teacher", "both"])
def test_rows_worked_on_in_parts_are_the_rows_at_once(
    temperature: float, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five rows at a time, the last part ragged, against all at once: float64, values and gradients."""
    logits = 5 * torch.randn(2, 23, 11, dtype=torch.float64)
    weights = logits[1].softmax(-1)
    found = []
    for cached in (1 << 16, 5 * 11):
        monkeypatch.setattr("gkl.losses.parts.CACHED", cached)
        student, teacher = (
            x.clone().requires_grad_(scope in (name, "both"))
            for x, name in zip(logits, ("student", "teacher"), strict=True)
        )
        value = gkl(
            student,
            teacher,
            weights,
            alpha=20.0,
            beta=4.0,
            gamma=0.4,
            temperature=temperature,
            reduction="none",
        )
        wanted = [x for x in (student, teacher) if x.requires_grad]
        found.append([value.detach(), *torch.autograd.grad((value * torch.arange(23)).sum(), wanted)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-14)


def test_a_row_s_bits_do_not_depend_on_another_s_offset() -> None:
    logits = torch.randn(2, 64, 11, generator=torch.Generator().manual_seed(0))
    logits[1] += 10.3  # an offset that is still left alone
    weights, found = logits[1].softmax(-1), []
    for offset in (0.0, 1000.0):
        student, teacher = (x.clone() for x in logits)
        student[0] += offset
        student.requires_grad_(), teacher.requires_grad_()
        value = gkl(
            student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4, pair_weight=1.0, reduction="none"
        )
        found.append([value.detach(), *torch.autograd.grad(value.sum(), (student, teacher))])
    for alone, beside in zip(*found, strict=True):
        assert beside[1:].equal(alone[1:])


@pytest.mark.parametrize("shape", [(7, 11), (2, 11, 5)])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_sample_wise_weights_are_the_softmax_s_power(gamma: float, shape: tuple[int, ...]) -> None:
    logits = 5 * torch.randn(shape, dtype=torch.float64)
    weigh = SampleWise(gamma, 3.0, torch.float64)
    smoothed, sums, probs = weigh(logits)
    torch.testing.assert_close(probs, (logits / 3.0).softmax(1))
    torch.testing.assert_close(smoothed, probs**gamma)
    torch.testing.assert_close(sums, smoothed.sum(1))
    assert weigh.totals(logits).equal(sums)


@pytest.mark.parametrize(("scope", "most"), [("student", 1), ("both", 2)])
def test_no_more_is_saved_than_the_gradients(scope: str, most: int) -> None:
    student, teacher = torch.randn(2, 64, 100).unbind()
    student.requires_grad_()
    teacher.requires_grad_(scope == "both")
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        gkl(student, teacher, teacher.detach().softmax(-1), alpha=20.0, beta=4.0, gamma=0.4)
    assert sum(n >= 64 * 100 for n in saved) == most and sum(saved) <= most * 64 * 100 + 64


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0, 1e4])
@pytest.mark.parametrize("classes", [100, 1000])
def test_float32_keeps_its_digits_whatever_is_added_to_the_logits(offset: float, classes: int) -> None:
    """Gradients against float64's on the same rounded logits: wMSE's to 2e-7 of itself, CE's p - q to 2e-7 of p and q."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, classes, generator=generator) + offset
    student = teacher + 0.3 * torch.randn(64, classes, generator=generator)
    weights = (teacher - offset).softmax(-1)
    for alpha, beta in ((20.0, 0.0), (0.0, 4.0)):
        found = []
        for dtype in (torch.float32, torch.float64):
            pair = [x.to(dtype).requires_grad_() for x in (student, teacher)]
            value = gkl(*pair, weights.to(dtype), alpha=alpha, beta=beta, gamma=0.4, validate=False)
            found.append([x.double() for x in torch.autograd.grad(value, pair)])
        size = [x.norm() for x in found[1]]
        if beta:
            size = [
                beta / 64 * (student.double().softmax(-1).norm() + teacher.double().softmax(-1).norm())
            ] * 2
        for single, double, whole in zip(*found, size, strict=True):
            assert (single - double).norm() <= 2e-7 * whole


FAR_APART = [(1e4, 1e4), (-1e4, 1e4), (1e4, -1e4), (0.0, 1e4), (1e4, 0.0), (300.0, -300.0)]


@pytest.mark.parametrize("classwise", [True, False])
@pytest.mark.parametrize("offsets", FAR_APART)
@pytest.mark.parametrize("compiled", [False, True])
def test_offsets_of_the_two_logits_that_differ_cost_no_digit_either(
    offsets: tuple[float, float], classwise: bool, compiled: bool
) -> None:
    """wMSE's gradient at gamma 0.4 to 2e-7 of itself, half of the rows with the offsets and half without."""
    # Logits without a large offset have finer digits, which what is taken off their rows rounds.
    bound = 2e-7 if min(map(abs, offsets)) == 1e4 else 3e-7
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 100, generator=generator)
    student = teacher + 0.3 * torch.randn(64, 100, generator=generator)
    weights = teacher.softmax(-1) if classwise else None
    student[::2] += offsets[0]
    teacher[::2] += offsets[1]

    def wmse(student: Tensor, teacher: Tensor) -> Tensor:
        rows = None if weights is None else weights.to(student.dtype)
        return gkl(student, teacher, rows, alpha=20.0, beta=0.0, gamma=0.4, validate=False)

    found = []
    for function, dtype in ((torch.compile(wmse, backend="aot_eager") if compiled else wmse, torch.float32),
                            (wmse, torch.float64)):  # fmt: skip
        pair = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        found.append([x.double() for x in torch.autograd.grad(function(*pair), pair)])
    for single, double in zip(*found, strict=True):
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            assert (single - double)[rows].norm() <= bound * double[rows].norm()


@pytest.mark.parametrize("temperature", [1.7, 4.0])
def test_a_temperature_rounds_no_offset(temperature: float) -> None:
    """At a common offset of 1e4, quotients and all: GKL's cross-entropy and sample-wise weights."""
    logits = torch.randn(2, 64, 100, generator=torch.Generator().manual_seed(0)) + 1e4
    found = []
    for dtype in (torch.float32, torch.float64):
        student, teacher = (x.to(dtype).requires_grad_() for x in logits)
        smoothed, total, _ = SampleWise(0.4, temperature, dtype)(teacher.detach())
        value = gkl(student, teacher, None, alpha=0.0, beta=1.0, gamma=0.4, temperature=temperature)
        (cross,) = torch.autograd.grad(value, student)
        found.append([smoothed, total, cross])
    probs = sum((x.double() / temperature).softmax(-1).norm() for x in logits) / (64 * temperature)
    for single, double, size in zip(*found, (found[1][0].norm(), found[1][1].norm(), probs), strict=True):
        assert (single.double() - double).norm() <= 2e-7 * size  # of p - q: of p and q


def test_compiled_it_is_one_graph_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 5 * torch.randn(2, 40, 30, dtype=torch.float64)
    monkeypatch.setattr("gkl.losses.parts.CACHED", 300)
    found = []

    def loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=0.4, validate=False)

    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        pair = [x.clone().requires_grad_() for x in logits]
        value = call(*pair, logits[1].softmax(-1))
        found.append([value.detach(), *torch.autograd.grad(value, pair)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)


DENSE = """
import torch
from gkl.losses.closed_form import gkl
from gkl.losses.prior import ClassPrior
torch.manual_seed(0)
maps = [torch.empty(16, 150, 128, 128).to(memory_format=torch.channels_last).normal_() for _ in range(2)]
student, teacher = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps)
student.requires_grad_()
labels, prior = torch.randint(150, (len(student),)), ClassPrior(150)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
small = slice(0, 1000)
gkl(student[small], teacher[small], prior[labels[small]], alpha=20.0, beta=4.0, gamma=1.0).backward()
student.grad = None
before = peak()
gkl(student, teacher, prior[labels], alpha=20.0, beta=4.0, gamma=1.0).backward()
print((peak() - before) / maps[0].nbytes, student.data_ptr() == maps[0].data_ptr())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_a_dense_map_takes_less_than_four_times_its_logits() -> None:
    """16 maps of 128 x 128 pixels and 150 classes, weights and gradients included, beyond the logits themselves."""
    done = subprocess.run([sys.executable, "-c", DENSE], capture_output=True, text=True, check=True)
    times, copied_nothing = done.stdout.split()
    assert 1.0 < float(times) < 4.0 and copied_nothing == "True"
