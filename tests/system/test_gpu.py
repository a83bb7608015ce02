"""The same numbers on a GPU as on the CPU: integers to the bit, float32 (without TF32) to its rounding.

What the kernels, the recorded steps and the attacks' recorded passes are alone stands in the other test_gpu_*.py.
"""

import copy
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.attacks.awp import perturbed
from gkl.attacks.pgd import PGD, pgd
from gkl.data.augment import Views
from gkl.data.digits import digits
from gkl.evaluation import accuracy, evaluate
from gkl.losses.closed_form import gkl, jsd, kl
from gkl.losses.prior import ClassPrior
from gkl.optim.averaging import Average, RampedAverage
from gkl.rng import sample_keys, uniform
from tests.system import test_ranks
from tests.system.test_fidelity import TinyNet
from tests.trainers.loop.test_engine import Quiet
from tests.trainers.methods import test_clip, test_distillation, test_segmentation, test_semi_supervised
from trainers.errors import Interrupted
from trainers.loop.engine import fit, gather
from trainers.loop.folder import RunFolder
from trainers.loop.training import Training
from trainers.methods.teacher_logits import LogitsCache

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def float32_as_it_is() -> Iterator[None]:
    """No TF32, and kernels that add in one order; afterwards as it was."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before


def on_both(made: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    return made(CPU), made(GPU)


def close(here: Any, there: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(there, here, rtol=rtol, atol=atol, check_device=False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return TinyNet().to(device)


def few(count: int = 32) -> tuple[Tensor, Tensor]:
    data = digits()
    return data.train_images[:count].float() / 255, data.train_labels[:count]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_random_numbers_and_views() -> None:
    index = torch.arange(64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    keys = sample_keys(0, 1, index, "a")
    assert sample_keys(0, 1, index.to(GPU), "a").cpu().equal(keys)
    assert uniform(keys.to(GPU), 5).cpu().equal(uniform(keys, 5))
    views = Views(["crop_flip", "autoaugment"])
    here, there = on_both(lambda device: views(images.to(device), seed=0, epoch=1, index=index))
    assert there[0].cpu().equal(here[0])
    assert (
        there[1].cpu().int() - here[1].int()
    ).abs().float().mean() < 1.0  # rounding of the colour operations


def test_kl_is_torch_s() -> None:
    def found(device: torch.device, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        pair = [x.to(device).requires_grad_() for x in 5 * randn(2, 128, 100)]
        value = loss(*pair)
        return value.detach(), *torch.autograd.grad(value, pair)

    def torch_s(student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")

    here, there = on_both(lambda device: found(device, kl))
    close(here, there)
    close(found(GPU, torch_s), there)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_losses(gamma: float) -> None:
    def found(device: torch.device) -> tuple[Tensor, ...]:
        student, teacher = (x.to(device).requires_grad_() for x in 5 * randn(2, 128, 100))
        weights = teacher.detach().softmax(-1)
        value = gkl(student, teacher, weights, alpha=20.0, beta=4.0, gamma=gamma) + jsd(student, teacher)
        return value.detach(), *torch.autograd.grad(value, (student, teacher))

    here, there = on_both(found)
    close(here, there, rtol=1e-4)


def test_class_prior() -> None:
    labels = torch.arange(64) % 9  # one class of ten is not seen

    def found(device: torch.device) -> list[Tensor]:
        prior, y = ClassPrior(10, temperature=2.0).to(device), labels.to(device)
        prior.update(randn(64, 10).to(device), y)
        prior.update(randn(64, 10, seed=1).to(device), y, counted=y > 2)
        sums = prior.sums.clone()
        prior.renew()
        return [sums, prior.probs, prior.rows(y, 0.4), prior.totals(y, 0.4), prior[y]]

    here, there = on_both(found)
    close(here, there)


@pytest.mark.parametrize("average", [Average(0.9, "step"), RampedAverage(0.995, warmup=0.2)])
def test_averages(average: Average) -> None:
    def found(device: torch.device) -> dict[str, Tensor]:
        mine, model = copy.deepcopy(average), network(device)
        mine.prepare(5, model)
        for step in range(5):
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    parameter.add_(randn(*parameter.shape, seed=10 * step + number).to(device))
            mine.after_step(model, 1)
        mine.after_epoch(model, 1)
        return mine.state

    here, there = on_both(found)
    close(here, there)


def test_the_teacher_s_logits_are_kept_to_the_bit(tmp_path: Path) -> None:
    cache = LogitsCache(tmp_path, {}, torch.zeros(1), pictures=8, views=2, classes=5, dtype=torch.float32)
    index, view, logits = torch.tensor([6, 1, 3]), torch.tensor([1, 0, 1]), randn(3, 5).to(GPU)
    cache.put(index, view, logits)
    kept, there = cache.get(index, view)
    assert there.all() and kept.equal(logits.cpu())


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start_std", [None, 0.001])
def test_attacks(norm: Any, start_std: float | None) -> None:
    """A pixel whose gradient is next to nothing may go the other way."""
    attack = PGD(norm=norm, epsilon=0.15, ramp=False, phases="executed", start_std=start_std)

    def found(device: torch.device) -> Tensor:
        x, y = (t.to(device) for t in few())
        start = attack.start(x, sample_keys(0, 1, torch.arange(32), "attack_start").to(device))
        model = network(device).eval()
        return pgd(
            model, x, lambda z: F.cross_entropy(z, y, reduction="none"), norm=norm, start=start,
            **attack.budget(1, 1),
        ).cpu()  # fmt: skip

    here, there = on_both(found)
    assert ((here - there).abs() > 1e-4).float().mean() < 1e-3


def test_weights_are_perturbed_and_come_back() -> None:
    def found(device: torch.device) -> list[Tensor]:
        x, y = (t.to(device) for t in few())
        model = network(device)
        before = [p.detach().clone() for p in model.parameters()]
        with perturbed(model, lambda: F.cross_entropy(model(x), y), 0.05):
            moved = [p.detach().clone() for p in model.parameters()]
        assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
        return moved

    here, there = on_both(found)
    close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("epsilon", "robust"), [(0.001, True), (0.9, False)])
def test_autoattack_s_flags(epsilon: float, robust: bool, tmp_path: Path) -> None:
    """The screen, in a ball so small that no verdict is close, and in one where everything falls."""
    images, labels = few(12)

    def found(device: torch.device) -> tuple[Tensor, Tensor]:
        model = network(device).eval()
        right = (
            model(images.to(device)).argmax(-1).cpu()
        )  # what it says is right, so that there is something to attack
        result = evaluate(model, images, torch.where(labels < 5, right, labels), epsilon=epsilon,
                          folder=tmp_path / device.type, device=device, version="screen", batch_size=6)  # fmt: skip
        clean = accuracy(model, images, right, batch_size=5, device=device)
        assert clean.all()
        return result.clean_flags, result.robust_flags

    here, there = on_both(found)
    assert here[0].equal(there[0]) and here[1].equal(there[1]) and here[0].any()
    assert here[1].any() == robust


# --- steps ------------------------------------------------------------------------------------------------------------


def floats(task: Training) -> dict[str, Tensor]:
    state = task.model.state_dict()
    return {k: v.detach().double().cpu().clone() for k, v in state.items() if v.is_floating_point()}


def stepped(task: Training, epoch: int, steps: int = 1) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What is logged of the last of some steps, and by how much they moved the network."""
    task.start_epoch(epoch)
    before = floats(task)
    for step in range(steps):
        scalars = {name: float(value.detach()) for name, value in task.train_step(epoch, step).items()}
    return scalars, {name: value - before[name] for name, value in floats(task).items()}


def assert_same_step(
    made: Callable[[torch.device], Training], epoch: int, within: float, steps: int = 1
) -> None:
    """Equal to `within` of the update."""
    (scalars, here), (others, there) = on_both(lambda device: stepped(made(device), epoch, steps))
    assert scalars.keys() == others.keys()
    for name, value in scalars.items():
        tolerance = (
            {"abs": 4.0}
            if value > 0 and ("accuracy" in name or "top1" in name)
            else {"rel": within, "abs": 1e-5}
        )
        assert others[name] == pytest.approx(value, **tolerance), name
    whole = torch.cat([move.flatten() for move in here.values()])
    other = torch.cat([there[name].flatten() for name in here])
    assert whole.norm() > 0 and (other - whole).norm() < within * whole.norm()


TWO_VIEWS = ["augment.views=[crop_flip,crop_flip]"]  # whose pixels are the same on every device
ADVERSARIAL: dict[str, list[str]] = {
    "at/c100_basic_gkl": [], "at/c100_basic_kl": [], "at/c100_autoaug": TWO_VIEWS, "at/c100_acat": [],
    "at/c100_dajat": ["augment.views=[crop_flip,crop_flip,crop_flip]"], "at/c100_dm_gkl": [], "at/c100_awp": [],
    "at/c100_lbgat_awp": [], "at/c100_las_at": [], "at/c10_rice": [],
}  # fmt: skip


@pytest.mark.parametrize("experiment", ADVERSARIAL)
def test_an_adversarial_step(experiment: str, tmp_path: Path) -> None:
    """In float64: an attack on KL begins where its gradient is next to nothing, and float32's rounding chooses the signs.

    The learning rate is a float32 number on a GPU.
    """

    def made(device: torch.device) -> Training:
        own = ADVERSARIAL[experiment]
        return test_ranks.make_task(experiment, tmp_path, *own, precision="float64", device=str(device))

    assert_same_step(made, 3, within=1e-6)


DISTILLATION = ["kd", "gkl", "ikl", "dkd", "fitnet", "rkd", "crd", "ofd", "reviewkd", "vanilla"]


@pytest.mark.parametrize("method", DISTILLATION)
def test_a_distillation_step(method: str, tmp_path: Path) -> None:
    def made(device: torch.device) -> Training:
        return test_distillation.make_task(method, tmp_path, "precision=float32", device=str(device))

    assert_same_step(made, 3, within=2e-3)


OTHERS: dict[str, Callable[[Path, str], Training]] = {
    **{row: lambda folder, device, row=row: test_semi_supervised.make_task(row, drop_path=0.0, device=device)
       for row in ("fixmatch_gkl", "mean_teacher_gkl")},
    **{row: lambda folder, device, row=row: test_segmentation.make_task(row, device=device) for row in ("baseline", "apd_gkl")},
    "clip": lambda folder, device: test_clip.make_task("gkl", folder, device=device),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_the_others(name: str, tmp_path: Path) -> None:
    """In float64, two steps, the first of which a warm-up may have at a rate of zero. Adam's first step is the gradient's sign, which
    rounding chooses where it is next to nothing."""
    if name == "clip":
        pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    assert_same_step(lambda device: OTHERS[name](tmp_path, str(device)), 1, within=1e-4, steps=2)


@pytest.mark.parametrize(("made", "epoch"), [("language_task", 1), ("make_task", 1), ("make_task", 2)])
def test_a_step_of_a_language_model(made: str, epoch: int, tmp_path: Path) -> None:
    """Alone, and LLaVA's in either phase, whose layers are computed twice on a GPU; transformers' norms and angles are float32."""
    test_llava = import_module("tests.trainers.methods.test_llava")  # which skips without the extra llava
    make = getattr(test_llava, made)
    assert_same_step(lambda device: make(tmp_path, device=str(device)), epoch, within=1e-4, steps=2)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_a_step_in_less_precision(precision: str, tmp_path: Path) -> None:
    """In fp16 the loss is scaled: a step that overflows is left out, the next ones are not."""
    made = test_ranks.make_task("at/c100_basic_gkl", tmp_path, precision=precision, device=str(GPU))
    scalars, moved = stepped(made, 3, steps=4)
    exact = test_ranks.make_task("at/c100_basic_gkl", tmp_path, precision="float32", device=str(GPU))
    others, _ = stepped(exact, 3, steps=4)
    assert all(math.isfinite(value) for value in scalars.values())
    assert all(value.isfinite().all() for value in moved.values()) and moved["conv1.weight"].norm() > 0
    assert scalars["loss/natural"] == pytest.approx(others["loss/natural"], rel=0.2)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_values_are_read_late() -> None:
    """What a later step writes into the same tensors does not reach the values on their way."""
    values = {"a": torch.tensor(3.0, device=GPU), "b": torch.tensor(4.0, device=GPU)}
    read = gather(values, signal.SIGTERM)
    values["a"].fill_(5.0)
    later = gather(values, 0)
    assert read() == ({"a": 3.0, "b": 4.0}, signal.SIGTERM) and later() == ({"a": 5.0, "b": 4.0}, 0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_stopped_and_gone_on_with_the_weights_are_the_same_bits(precision: str, tmp_path: Path) -> None:
    def run(folder: str, stop_after: tuple[int, int] | None = None) -> dict[str, Any]:
        task = test_ranks.make_task("at/c100_basic_gkl", tmp_path, precision=precision, device=str(GPU))
        with pytest.raises(Interrupted) if stop_after else nullcontext():
            fit(
                task,
                epochs=3,
                folder=RunFolder(tmp_path / folder),
                checkpoint_minutes=1e9,
                report=Quiet(stop_after),
            )
        return copy.deepcopy(task.state_dict())

    whole = run("whole")
    run("stopped", stop_after=(2, 3))
    resumed = run("stopped")
    for key, value in whole["model"].items():
        assert value.is_cuda == (GPU.type == "cuda") and value.equal(resumed["model"][key]), key
    test_ranks.assert_equal(whole["averages"], resumed["averages"], "averages", rtol=0, atol=0)
    # Sums over a class are added in no fixed order on a GPU, in float64.
    close(whole["prior"]["probs"], resumed["prior"]["probs"], rtol=1e-6, atol=1e-9)
