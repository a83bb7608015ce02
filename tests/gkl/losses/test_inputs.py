"""Labels, maps and masks: what is taken, what is refused in one line, and that what does not count tells nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from gkl import ClassPrior, GKLLoss, dkl, gkl_loss, ikl, jsd, kl

SETTINGS: dict[str, Any] = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4}
EXACT = {"rtol": 1e-11, "atol": 1e-13}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
Loss = Callable[..., Tensor]


def prior_of(classes: int) -> ClassPrior:
    prior = ClassPrior(classes).double()
    draw = torch.Generator().manual_seed(classes)
    prior.probs.copy_((2 * torch.randn(classes, classes, dtype=torch.float64, generator=draw)).softmax(-1))
    return prior


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_every_integer_dtype_are_the_same(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=draw)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    found = []
    for each in (labels, labels.to(dtype)):
        prior, criterion = prior_of(5), GKLLoss(5, **SETTINGS).double()
        criterion(student, teacher, each)
        criterion.renew()
        found.append([prior[each], gkl_loss(student, teacher, prior.at(each), **SETTINGS)])
        prior.update(teacher, each, counted=each != 2)
        prior.renew()
        found[-1] += [prior.probs, criterion.prior.probs, criterion(student, teacher, each)]
    for mine, theirs in zip(*found, strict=True):
        assert mine.equal(theirs)


USES: dict[str, Callable[[ClassPrior, Tensor], object]] = {
    "prior[labels]": lambda prior, labels: prior[labels],
    "gkl_loss": lambda prior, labels: gkl_loss(torch.zeros(4, 3), torch.zeros(4, 3), prior.at(labels), **SETTINGS),
    "update": lambda prior, labels: prior.update(torch.zeros(4, 3), labels),
    "GKLLoss": lambda prior, labels: GKLLoss(3, **SETTINGS)(torch.zeros(4, 3), torch.zeros(4, 3), labels),
    "ignore_index": lambda prior, labels: GKLLoss(3, **SETTINGS, ignore_index=77)(
        torch.zeros(4, 3), torch.zeros(4, 3), labels
    ),
}  # fmt: skip
WRONG: dict[str, tuple[Any, str]] = {
    "(B, 1)": (torch.zeros(4, 1, dtype=torch.int64), r"got \(4, 1\) of torch\.int64.*labels\.squeeze\(-1\)"),
    "(B, 1) of uint8": (torch.zeros(4, 1, dtype=torch.uint8), r"\(4, 1\) of torch\.uint8.*squeeze"),
    "float": (torch.zeros(4), r"of an integer dtype.*got \(4,\) of torch\.float32"),
    "bool": (torch.zeros(4, dtype=torch.bool), r"got \(4,\) of torch\.bool"),
    "one-hot": (torch.eye(4, 3).long(), r"got \(4, 3\) of torch\.int64"),
    "no tensor": ([0, 1, 2, 0], r"got list"),
    "scalar": (torch.tensor(1), r"got \(\) of"),
    "too large": (torch.tensor([0, 3, 1, 1]), r"labels must lie in 0\.\.2, got 0\.\.3; .*counted \(\(labels >= 0\) & \(labels < 3\)\)"),
    "negative": (torch.tensor([0, -100, 1, 1]), r"labels must lie in 0\.\.2, got -100\.\.1; .*labels >= 0\) & \(labels < 3"),
    "255 of uint8": (torch.tensor([0, 255, 1, 1], dtype=torch.uint8), r"got 0\.\.255"),
    "-1 of int8": (torch.tensor([0, -1, 1, 1], dtype=torch.int8), r"got -1\.\.1"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrong", WRONG)
def test_labels_that_are_no_classes_are_told_in_one_line(use: str, wrong: str) -> None:
    labels, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message) as error:
        USES[use](ClassPrior(3), labels)
    assert "\n" not in str(error.value)


# --- maps and sequences -----------------------------------------------------------------------------------------------

SHAPES = {"sequence": (3, 5, 4), "map": (2, 5, 3, 4), "volume": (2, 5, 2, 3, 2), "batch": (6, 5)}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "apart": lambda x: torch.nn.functional.pad(x, (0, 2))[..., :-2],
    "turned": lambda x: x.transpose(2, -1).contiguous().transpose(2, -1) if x.ndim > 3 else x,
}


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def losses(labels: Tensor) -> dict[str, Loss]:
    """Each as a function of (student, teacher, counted, reduction) with logits and labels of one form."""
    prior = prior_of(5)
    weights = prior.probs[labels.clamp(0, 4).flatten()].view(*labels.shape, 5).movedim(-1, 1)
    at = prior.at(labels)
    return {
        "class rows": lambda s, t, **k: gkl_loss(s, t, at, **SETTINGS, **k),
        "class rows, temperature": lambda s, t, **k: gkl_loss(s, t, at, **SETTINGS, temperature=2.0, **k),
        "class rows, create_graph": lambda s, t, **k: gkl_loss(s, t, at, **SETTINGS, create_graph=True, **k),
        "weights": lambda s, t, **k: gkl_loss(s, t, weights, **SETTINGS, **k),
        "sample-wise": lambda s, t, **k: gkl_loss(s, t, None, **SETTINGS, **k),
        "sample-wise, temperatures": lambda s, t, **k: gkl_loss(
            s, t, None, **SETTINGS, temperature=2.0, weights_temperature=3.0, **k
        ),
        "number": lambda s, t, **k: gkl_loss(s, t, at, **SETTINGS, pair_weight=1.7, **k),
        "of the squares": lambda s, t, **k: gkl_loss(s, t, at, **SETTINGS, pair_weight=torch.amax, **k),
        "dkl": lambda s, t, **k: dkl(s, t, **k),
        "ikl": lambda s, t, **k: ikl(s, t, at, alpha=20.0, beta=4.0, **k),
        "kl": lambda s, t, **k: kl(s, t, temperature=2.0, **k),
        "jsd": lambda s, t, **k: jsd(s, t, **k),
    }


NAMES = list(losses(torch.zeros(1, dtype=torch.int64)))


def case(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with an offset in some rows, labels and a mask."""
    draw = torch.Generator().manual_seed(len(shape))
    student, teacher = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    positions = shape[:1] + shape[2:]
    teacher = teacher + 100.0 * (torch.rand(positions, generator=draw) < 0.2).unsqueeze(1)
    return (
        student,
        teacher,
        torch.randint(5, positions, generator=draw),
        torch.rand(positions, generator=draw) < 0.7,
    )


@pytest.mark.parametrize(
    ("cached", "layout"), [*((10, layout) for layout in LAYOUTS), (40, "contiguous"), (1 << 18, "turned")]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_map_is_its_counted_positions_as_a_batch(
    name: str, shape: str, layout: str, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, with what does not count NaN, infinite and of labels that are no class."""
    monkeypatch.setattr("gkl.losses.parts.CACHED", cached)
    student, teacher, labels, counted = case(SHAPES[shape])
    spread = counted.unsqueeze(1).expand_as(student)
    dirty = [torch.where(spread, x, bad) for x, bad in ((student, float("nan")), (teacher, float("-inf")))]
    ours = losses(torch.where(counted, labels, 255))[name]
    chosen = losses(labels.flatten()[counted.flatten()])[name]
    pair = [LAYOUTS[layout](x).requires_grad_() for x in dirty]
    own = [rows(x)[counted.flatten()].requires_grad_() for x in (student, teacher)]
    value, expected = ours(*pair, counted=counted), chosen(*own)
    torch.testing.assert_close(value, expected, **EXACT)
    each = ours(*pair, counted=counted, reduction="none")
    assert each.shape == labels.shape and (each[~counted] == 0).all()
    torch.testing.assert_close(each[counted], chosen(*own, reduction="none"), **EXACT)
    # What comes back to a position that does not count may be anything too.
    upstream = torch.where(counted, 1.0 / counted.sum().double(), float("nan"))
    wanted = [torch.autograd.grad(expected, own, allow_unused=True)] * 2
    found = [
        torch.autograd.grad(value, pair, retain_graph=True, allow_unused=True),
        torch.autograd.grad(each, pair, upstream, allow_unused=True),
    ]
    for mine, theirs in zip(found, wanted, strict=True):
        for ours_, theirs_ in zip(mine, theirs, strict=True):
            assert ours_.shape == student.shape and (rows(ours_)[~counted.flatten()] == 0).all()
            torch.testing.assert_close(rows(ours_)[counted.flatten()], theirs_, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("weights", "of the squares")])
def test_without_a_mask_a_map_is_all_of_its_positions(name: str) -> None:
    student, teacher, labels, _ = case(SHAPES["map"])
    everything = torch.ones_like(labels, dtype=torch.bool)
    ours = losses(labels)[name]
    torch.testing.assert_close(ours(student, teacher), ours(student, teacher, counted=everything), **EXACT)
    assert ours(student, teacher, reduction="none").shape == labels.shape
    flat = losses(labels.flatten())[name]
    torch.testing.assert_close(ours(student, teacher), flat(rows(student), rows(teacher)), **EXACT)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n != "of the squares"]
)  # what comes of no squares is the caller's
def test_where_nothing_counts_the_loss_and_its_gradients_are_zero(name: str) -> None:
    student, teacher, labels, _ = case(SHAPES["map"])
    pair = [torch.full_like(x, float("nan")).requires_grad_() for x in (student, teacher)]
    value = losses(labels)[name](*pair, counted=torch.zeros_like(labels, dtype=torch.bool))
    assert value == 0
    for gradient in torch.autograd.grad(value, pair, allow_unused=True):
        assert gradient is not None and (gradient == 0).all()


def test_torch_func_and_a_compiled_graph_take_maps_and_masks() -> None:
    student, teacher, labels, counted = case(SHAPES["map"])
    ours = losses(torch.where(counted, labels, 255))["class rows"]
    (expected,) = torch.autograd.grad(
        ours(s := student.clone().requires_grad_(), teacher, counted=counted), s
    )
    found = grad(lambda s: ours(s, teacher, counted=counted))(student)
    torch.testing.assert_close(found, expected, **EXACT)
    compiled = torch.compile(
        lambda s: ours(s, teacher, counted=counted, validate=False), backend="aot_eager", fullgraph=True
    )
    (found,) = torch.autograd.grad(compiled(s := student.clone().requires_grad_()), s)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prior_of_a_map_is_that_of_its_counted_positions(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkl.losses.parts.CACHED", 10)
    _, teacher, labels, counted = case(SHAPES[shape])
    one, other = ClassPrior(5).double(), ClassPrior(5).double()
    other.update(rows(teacher)[counted.flatten()], labels[counted])
    dirty = torch.where(counted.unsqueeze(1), teacher, float("nan"))
    one.update(dirty, torch.where(counted, labels, -100), counted=counted)
    torch.testing.assert_close(one.sums, other.sums, **EXACT)
    assert one.counts.equal(other.counts)


@pytest.mark.parametrize("ignored", [255, -100])
def test_the_module_leaves_out_its_ignore_index(ignored: int) -> None:
    student, teacher, labels, counted = case(SHAPES["map"])
    criterion = GKLLoss(5, **SETTINGS, ignore_index=ignored).double()
    labels = torch.where(counted, labels, ignored)
    labels = labels.to(torch.uint8) if ignored > 0 else labels
    dirty = [torch.where(counted.unsqueeze(1), x, float("nan")) for x in (student, teacher)]
    prior = ClassPrior(5).double()
    for _ in range(2):  # the second is weighed by the first
        found = criterion(*dirty, labels)
        expected = gkl_loss(student, teacher, prior.at(labels), counted=counted, **SETTINGS)
        torch.testing.assert_close(found, expected, **EXACT)
        prior.update(teacher, labels, counted)
        criterion.renew(), prior.renew()
    half = torch.rand(counted.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = criterion.eval()(*dirty, labels, half)
    expected = gkl_loss(student, teacher, prior.at(labels), counted=counted & half, **SETTINGS)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("dtype", "ignored", "label"), [(torch.uint8, -100, 156), (torch.int8, 255, -1)])
def test_an_ignore_index_that_the_labels_dtype_cannot_hold_ignores_no_other_label(
    dtype: torch.dtype, ignored: int, label: int
) -> None:
    """torch compares uint8's 156 with -100 as equal, and int8's -1 with 255."""
    criterion = GKLLoss(200, **SETTINGS, ignore_index=ignored)
    labels = torch.tensor([0, label], dtype=dtype)
    if label < 0:
        with pytest.raises(ValueError, match="got -1"):
            criterion(torch.zeros(2, 200), torch.ones(2, 200), labels)
    else:
        criterion(torch.zeros(2, 200), torch.ones(2, 200), labels)
        assert criterion.prior.counts[[0, label]].tolist() == [1.0, 1.0]


SEQUENCE, MAP = torch.zeros(2, 4, 3), torch.zeros(2, 3, 4, 4)  # (B, T, C) with 3 classes; (B, C, H, W)
ZEROS = {
    n: torch.zeros(2, *shape, dtype=torch.int64) for n, shape in (("T", (4,)), ("HW", (4, 4)), ("CH", (3, 4)))
}
REFUSED: dict[str, tuple[Callable[[ClassPrior], object], str]] = {
    "(B, T, C) with labels": (
        lambda p: gkl_loss(SEQUENCE, SEQUENCE, p.at(ZEROS["T"]), **SETTINGS),
        r"labels must be \(2, 3\).*got \(2, 4\).*dimension 1: logits\.movedim\(-1, 1\)",
    ),
    "(B, T, C) with a mask": (
        lambda p: gkl_loss(SEQUENCE, SEQUENCE, None, **SETTINGS, counted=ZEROS["T"] == 0),
        r"counted must be \(2, 3\).*got \(2, 4\).*movedim\(-1, 1\)",
    ),
    "nothing that tells (B, C, T) from (B, T, C)": (
        lambda p: gkl_loss(SEQUENCE, SEQUENCE, None, **SETTINGS),
        r"\(2, 4, 3\) could be \(B, C, T\) or \(B, T, C\): pass counted",
    ),
    "the same of kl": (lambda p: kl(SEQUENCE, SEQUENCE), "pass counted"),
    "the same of jsd": (lambda p: jsd(SEQUENCE, SEQUENCE), "pass counted"),
    "the same of dkl": (lambda p: dkl(SEQUENCE, SEQUENCE), "pass counted"),
    "another number of classes": (
        lambda p: gkl_loss(MAP, MAP, ClassPrior(5).at(ZEROS["HW"]), **SETTINGS),
        r"prior has 5 classes, logits \(2, 3, 4, 4\) have 3 in dimension 1",
    ),
    "labels of another map": (
        lambda p: gkl_loss(MAP, MAP, p.at(ZEROS["CH"]), **SETTINGS), r"labels must be \(2, 4, 4\).*got \(2, 3, 4\)",
    ),
    "labels of (B, 1, H, W)": (
        lambda p: gkl_loss(MAP, MAP, p.at(ZEROS["HW"][:, None]), **SETTINGS), r"got \(2, 1, 4, 4\) of",
    ),
    "a mask of numbers": (
        lambda p: gkl_loss(MAP, MAP, p.at(ZEROS["HW"]), counted=torch.ones(2, 4, 4), **SETTINGS),
        r"counted must be \(2, 4, 4\) of bool.*got \(2, 4, 4\) of torch\.float32",
    ),
    "a mask of another shape": (
        lambda p: kl(MAP, MAP, counted=torch.ones(2, 4, dtype=torch.bool)), r"counted must be \(2, 4, 4\).*got \(2, 4\)",
    ),
    "the prior's rows of a map": (
        lambda p: p[ZEROS["HW"]], r"labels must be \(B,\).*prior\.at\(labels\) takes those of maps",
    ),
    "an update of a map with (B,) labels": (
        lambda p: p.update(MAP, ZEROS["HW"][:, 0, 0]), r"labels must be \(2, 4, 4\).*got \(2,\)",
    ),
    "an update of (B, T, C)": (
        lambda p: p.update(SEQUENCE, ZEROS["T"]), r"the class prior needs logits \(2, 3, 4\), got \(2, 4, 3\)",
    ),
    "a mask for an update": (
        lambda p: p.update(MAP, ZEROS["HW"], torch.ones(2, 4, 4)), "counted must be .* of bool",
    ),
    "weights that are no probabilities where it counts": (
        lambda p: gkl_loss(MAP, MAP, MAP, **SETTINGS, counted=ZEROS["HW"] == 0), "must be probabilities",
    ),
    "a divisor for each position of the squares": (
        lambda p: gkl_loss(
            MAP, MAP, p.at(ZEROS["HW"]), **SETTINGS, pair_weight=lambda squares: squares, counted=ZEROS["HW"] == 0
        ),
        "one number where counted is given",
    ),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_what_cannot_be_told_apart_is_refused_in_one_line(refused: str) -> None:
    call, message = REFUSED[refused]
    with pytest.raises(ValueError, match=message) as error:
        call(ClassPrior(3))
    assert "\n" not in str(error.value)


def test_a_nan_in_one_row_costs_another_s_offset_no_digit() -> None:
    teacher = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    student = teacher + 0.3 * torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    found = []
    for spoilt in (False, True):
        pair = [(student + 3e4).clone(), (teacher - 1e4).clone()]
        pair[0][3] = float("nan") if spoilt else pair[0][3]
        pair = [x.requires_grad_() for x in pair]
        value = gkl_loss(*pair, None, **SETTINGS, reduction="none", pair_weight=1.0)
        found.append(torch.autograd.grad(value.sum(), pair))
    for clean, beside in zip(*found, strict=True):
        assert beside[:3].equal(clean[:3]) and beside[4:].equal(clean[4:])


# --- memory -----------------------------------------------------------------------------------------------------------

DENSE = """
import sys
import torch
from gkl import ClassPrior, gkl_loss
weights, layout = sys.argv[1:]
torch.manual_seed(0)
form = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]
student, teacher = (torch.empty(2, 150, 200, 200).to(memory_format=form).normal_().requires_grad_() for _ in range(2))
labels, prior = torch.randint(150, (2, 200, 200)), ClassPrior(150)
labels[:, ::7] = 255

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def step(*corner):
    s, t, y = student[corner], teacher[corner], labels[corner[:1] + corner[2:]]
    rows = prior.at(y) if weights == "class" else None
    loss = gkl_loss(s, t, rows, alpha=20.0, beta=4.0, gamma=0.4, counted=y != 255)
    gradients = torch.autograd.grad(loss, (s, t))
    prior.update(t.detach(), y, y != 255)
    return gradients

step(slice(None), slice(None), slice(0, 20), slice(0, 20))
before = peak()
step()
print((peak() - before) / (student.numel() * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
@pytest.mark.parametrize(
    ("weights", "layout"),
    [
        ("class", "nchw"),
        ("sample", "nhwc"),
        *(pytest.param(*other, marks=pytest.mark.long) for other in (("class", "nhwc"), ("sample", "nchw"))),
    ],  # a process each
)
def test_a_map_with_a_mask_takes_four_and_a_half_times_its_logits_at_most(weights: str, layout: str) -> None:
    """Loss, gradients to both and the prior's update, beyond the logits: two gradients kept, two returned."""
    command = [sys.executable, "-c", DENSE, weights, layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 3.5 < float(done.stdout) < 4.5


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_temperatures_that_are_none_are_refused(value: Any) -> None:
    """Once a negative one gave a number, and 0 NaN or a ZeroDivisionError."""
    student, teacher = torch.randn(2, 4, 5)
    shown = float(value)
    for call in (
        lambda: gkl_loss(student, teacher, None, **SETTINGS, temperature=value),
        lambda: gkl_loss(student, teacher, None, **SETTINGS, weights_temperature=value),
        lambda: kl(student, teacher, temperature=value),
        lambda: GKLLoss(5, **SETTINGS, temperature=value)(student, teacher, torch.arange(4)),
    ):
        with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, got {shown}"):
            call()
    with pytest.raises(ValueError, match="temperature above 0"):
        ClassPrior(5, temperature=shown)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_logits_that_are_none_are_refused(dtype: torch.dtype) -> None:
    """Predicted classes, or masks, in their place."""
    logits = torch.randn(4, 5)
    for loss in (lambda s, t: gkl_loss(s, t, None, **SETTINGS), kl, jsd, dkl):
        for pair, who in (((logits.to(dtype), logits), "student"), ((logits, logits.to(dtype)), "teacher")):
            with pytest.raises(ValueError, match=f"{who} logits must be of a floating dtype, got {dtype}"):
                loss(*pair)
    with pytest.raises(
        ValueError, match=f"the class prior's logits must be of a floating dtype, got {dtype}"
    ):
        ClassPrior(5).update(logits.to(dtype), torch.arange(4))


@pytest.mark.parametrize("value", [-5.0, float("nan"), float("inf"), torch.tensor(-1.0)])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_factors_that_would_be_climbed_are_refused(name: str, value: Any) -> None:
    logits = torch.zeros(2, 3)
    told = f"{name} must be a finite number of at least 0, got "
    with pytest.raises(ValueError, match=told):
        gkl_loss(logits, logits, None, **SETTINGS | {name: value})
    with pytest.raises(ValueError, match=told):
        dkl(logits, logits, **{name: value})
    assert gkl_loss(logits, logits, None, **SETTINGS | {name: 0}).isfinite()


@pytest.mark.parametrize("several", [torch.ones(3), torch.ones(3, 1), torch.ones(1, 1), "1", None, [1.0]])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "temperature", "weights_temperature"])
def test_a_setting_is_one_number(name: str, several: Any) -> None:
    """A column of alphas once gave (B, B) values, and a row of betas another gradient where B was C."""
    logits = torch.randn(3, 3)
    what = "one number, got a tensor" if isinstance(several, torch.Tensor) else "a number, got"
    with pytest.raises(ValueError, match=f"^{name} must be {what}"):
        gkl_loss(logits, logits, None, **SETTINGS | {name: several})
    if name == "temperature":
        with pytest.raises(ValueError, match=f"temperature must be {what}"):
            kl(logits, logits, temperature=several)


@pytest.mark.parametrize(
    ("divisor", "message"),
    [
        (0.0, "a finite number above 0, got 0.0"),
        (-1.0, "a finite number above 0, got -1.0"),
        (torch.tensor(float("nan")), "a finite number above 0, got nan"),
        (torch.ones(3), r"one number or one for each of the 4 examples, got \(3,\)"),
        (lambda squares: torch.ones(4, 4), r"one number or one for each of the 4 examples, got \(4, 4\)"),
        (lambda squares: None, "a number, got NoneType"),
    ],
)
def test_a_divisor_that_is_none_is_refused(divisor: Any, message: str) -> None:
    student, teacher = torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match=f"pair_weight must be {message}"):
        gkl_loss(student, teacher, None, **SETTINGS, pair_weight=divisor)


def test_a_column_of_divisors_is_one_for_each_example() -> None:
    student, teacher = torch.randn(2, 4, 5)
    own, column = (
        gkl_loss(student, teacher, None, **SETTINGS, pair_weight=give)
        for give in (lambda squares: squares, lambda squares: squares[:, None])
    )
    assert own.equal(column)


@pytest.mark.parametrize(
    "logits", [(torch.zeros(2, 3),), {"logits": torch.zeros(2, 3)}, torch.zeros(2, 3).numpy()]
)
def test_what_is_no_tensor_is_one_line(logits: Any) -> None:
    """A network's tuple or dict, an array; and a prior that was not asked for its rows."""
    kind, plain = type(logits).__name__, torch.zeros(2, 3)
    for student, teacher, name in ((logits, plain, "student"), (plain, logits, "teacher")):
        for loss in (kl, jsd, dkl, lambda s, t: gkl_loss(s, t, None, **SETTINGS)):
            with pytest.raises(
                ValueError, match=f"{name} logits must be a tensor, got {kind}; pass the logits"
            ):
                loss(student, teacher)
    with pytest.raises(
        ValueError, match=r"weights must be a tensor .*, got ClassPrior; pass prior\[labels\]"
    ):
        gkl_loss(plain, plain, ClassPrior(3), **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"the class prior's logits must be a tensor, got {kind}"):
        ClassPrior(3).update(logits, torch.zeros(2, dtype=torch.int64))
