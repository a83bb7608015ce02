"""Recorded work: the keys, the failures, and whole training steps replayed on the CPU, bit for bit what they are without."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves_with_path

from gkl.losses import gradients
from gkl.losses.prior import ClassPrior
from gkl.optim.optimizers import lamb
from tests.tape import Taped
from tests.trainers.methods import test_clip, test_segmentation, test_semi_supervised
from tests.trainers.methods.test_adversarial import task_of
from tests.trainers.methods.test_distillation import make_task
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.identity import config_hash
from trainers.runs.settings import build
from trainers.runs.targets import instantiate


def test_a_key_is_run_then_recorded_then_replayed_with_the_same_bits() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    taped = Taped()

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (x @ weight).relu().square().sum()
        (grad,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight.sub_(0.01 * grad)
        return {"loss": loss}

    other = weight.detach().clone().requires_grad_()
    for number in range(5):
        x = torch.randn(2, 4)
        found = taped("step", step, (x,))["loss"].clone()
        loss = (x @ other).relu().square().sum()
        (grad,) = torch.autograd.grad(loss, other)
        other = (other.detach() - 0.01 * grad).requires_grad_()
        assert found.equal(loss.detach()) and weight.equal(other) and not found.requires_grad
        assert (taped.recorded, taped.replayed) == (min(number, 1), number)


def test_keys_and_shapes_have_recordings_of_their_own_and_the_oldest_goes() -> None:
    taped = Taped(kept=2)

    def scaled(by: float):
        return lambda x: [x * by]

    for _ in range(3):
        for by in (1.0, 2.0):
            assert taped(by, scaled(by), (torch.ones(3),))[0].equal(torch.full((3,), by))
    assert taped.recorded == 2
    taped(1.0, scaled(1.0), (torch.ones(4),))
    assert len(taped.known) == 2


def test_what_cannot_be_recorded_is_told_once_and_computed_all_the_same() -> None:
    told: list[str] = []
    taped = Taped(warn=told.append)
    state = torch.zeros(1)

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        state.add_(1)
        return (x * float(x.sum()),)  # reads a value back

    for _ in range(4):
        assert taped("key", step, (torch.ones(2),))[0].equal(torch.full((2,), 2.0))
    assert state.item() == 4.0
    assert len(told) == 1 and "cannot be recorded" in told[0] and "not permitted" in told[0]


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_a_number_that_python_holds_is_part_of_the_recording(number: float) -> None:
    """Why keys must name them."""
    taped, held = Taped(), {"by": number}
    for _ in range(2):
        taped("key", lambda x: [x * held["by"]], (torch.ones(1),))
    held["by"] = 5.0
    assert taped("key", lambda x: [x * held["by"]], (torch.ones(1),))[0].item() == number


def others(*names: str) -> list[Any]:
    """The same in other methods."""
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


AT = ["c100_basic_gkl", "c100_dm", *others("c100_basic_kl", "c100_autoaug", "c100_acat", "c100_dajat", "c10_rice", "c100_awp", "c100_lbgat_awp")]  # fmt: skip
KD = ["gkl", "crd", *others("kd", "ikl", "dkd", "fitnet", "rkd", "ofd", "reviewkd", "vanilla")]


OTHERS: dict[str, Callable[[Path], Training]] = {
    **{row: lambda folder, row=row: test_semi_supervised.make_task(row) for row in ("fixmatch_gkl", "mean_teacher_gkl")},
    **{row: lambda folder, row=row: test_segmentation.make_task(row) for row in ("baseline", "apd_gkl")},
    "clip": lambda folder: test_clip.make_task("gkl", folder, "accumulate=2"),
    "denoising": lambda folder: denoising(),
}  # fmt: skip


def denoising() -> Training:
    words = [
        "experiment=ssl/denoising",
        "scale=smoke",
        "precision=float64",
        "channels_last=false",
        "epochs=2",
        "device=cpu",
    ]
    config = compose("train", words)
    torch.manual_seed(0)
    return build(config, data=instantiate(config["data"]), device=torch.device("cpu"))


def optimizers(task: Training) -> list[torch.optim.Optimizer]:
    """The training's, and APD's for the teacher's transform."""
    return [task.optimizer, *(o for o in vars(task.method).values() if isinstance(o, torch.optim.Optimizer))]


def with_rates_on_the_device(task: Training) -> Training:
    """As Training.fuse_optimizer has them on a GPU."""
    for group in (group for optimizer in optimizers(task) for group in optimizer.param_groups):
        group.update(lr=torch.as_tensor(group["lr"], dtype=torch.float64), fused=True, foreach=False)
    return task


def trained(task: Training, epochs: range) -> list[dict[str, float]]:
    """Some steps of some epochs, the last and shorter one too; what was logged."""
    logged = []
    for epoch in epochs:
        task.start_epoch(epoch)
        for step in (*range(min(4, task.steps_per_epoch - 1)), task.steps_per_epoch - 1):
            logged.append({name: value.item() for name, value in task.train_step(epoch, step).items()})
        task.method.end_epoch()
        for average in task.averages.values():
            average.after_epoch(task.model, epoch)
    return logged


@pytest.fixture
def nothing_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where neither labels nor the logits' offsets are read back."""
    monkeypatch.setattr(ClassPrior, "_check", lambda self, labels: None)
    monkeypatch.setattr(gradients, "_far", lambda offsets: True)


def assert_alike(one: Any, other: Any) -> None:
    pairs = zip(tree_leaves_with_path(one), tree_leaves_with_path(other), strict=True)
    for (path, here), (_, there) in pairs:
        same = here.equal(there) if isinstance(here, torch.Tensor) else here == there
        assert same, path


@pytest.mark.usefixtures("nothing_read_back")
@pytest.mark.parametrize("experiment", AT)
def test_replayed_adversarial_steps_are_the_same_to_the_bit(experiment: str, tmp_path: Path) -> None:
    """Over epochs that change learning rate, radius, weight perturbation and averages; with everything in a checkpoint."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    plain, taped = (
        with_rates_on_the_device(
            task_of(f"at/{experiment}", "epochs=4", "batch_size=128", "attack.ramp=true", *own)[1]
        )
        for _ in range(2)
    )
    taped.replayed = tape = Taped(warn=pytest.fail)
    assert trained(taped, range(1, 5)) == trained(plain, range(1, 5))
    assert_alike(taped.state_dict(), plain.state_dict())
    assert tape.replayed >= 12 and tape.recorded <= 5  # an epoch needs no recording of its own
    state = copy.deepcopy(taped.state_dict())
    for task in (plain, taped):
        task.load_state_dict(copy.deepcopy(state))
        with_rates_on_the_device(task)
    assert trained(taped, range(4, 5)) == trained(plain, range(4, 5))


@pytest.mark.usefixtures("nothing_read_back")
@pytest.mark.parametrize("method", KD)
def test_replayed_distillation_steps_are_the_same_to_the_bit(method: str, tmp_path: Path) -> None:
    """With methods that rise over epochs, that draw by epoch, and with a teacher whose logits are kept and whose are not."""
    for cache in ("null", str(tmp_path / "kept")):
        if method == "vanilla" and cache != "null":
            continue
        changed = [] if method == "vanilla" else [f"teacher.cache={cache}"]
        plain, taped = (with_rates_on_the_device(make_task(method, tmp_path, *changed)) for _ in range(2))
        taped.replayed = tape = Taped(warn=pytest.fail)
        assert trained(taped, range(1, 4)) == trained(plain, range(1, 4))
        assert_alike(taped.state_dict(), plain.state_dict())
        assert tape.replayed >= 5


@pytest.mark.usefixtures("nothing_read_back")
@pytest.mark.parametrize("name", OTHERS)
def test_replayed_steps_of_the_others_are_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    """Adam's count of its steps and rates that each step writes; a target of averaged weights; APD's second optimizer."""
    if name == "clip":
        pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    plain, taped = (with_rates_on_the_device(OTHERS[name](tmp_path)) for _ in range(2))
    taped.replayed = tape = Taped(warn=pytest.fail)
    assert trained(taped, range(1, 3)) == trained(plain, range(1, 3))
    assert_alike(taped.state_dict(), plain.state_dict())
    assert tape.replayed >= 4 and tape.recorded <= 2 and taped.replayed is tape


def test_an_optimizer_that_counts_in_python_says_so() -> None:
    task = test_semi_supervised.make_task("fixmatch_gkl")
    assert task.unrecordable() is None
    task.optimizer = lamb(task.model, lr=0.1)
    assert task.unrecordable() == "Lamb counts its steps in Python"


def test_an_adam_of_a_gpu_goes_on_without_one() -> None:
    """Its count and rates come from the device, whose update is one kernel; a run on a CPU has torch's own again."""
    there, here = (test_segmentation.make_task("apd_gkl") for _ in range(2))
    kept = [{k: v for k, v in g.items() if k != "params"} for o in optimizers(here) for g in o.param_groups]
    for group in (g for o in optimizers(with_rates_on_the_device(there)) for g in o.param_groups):
        group.update({"capturable": True} if "capturable" in group else {})
    trained(there, range(1, 2))
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    groups = [{k: v for k, v in g.items() if k != "params"} for o in optimizers(here) for g in o.param_groups]
    for found, before in zip(groups, kept, strict=True):
        assert found | {"lr": 0.0} == before | {"lr": 0.0} and type(found["lr"]) is float
    trained(here, range(2, 3))


def test_a_method_that_cannot_be_recorded_says_so_and_trains(tmp_path: Path) -> None:
    task = task_of("at/c100_las_at", "epochs=4", "batch_size=128")[1]
    told: list[str] = []
    task.say, task.replayed = told.append, Taped(warn=pytest.fail)
    task.start_epoch(1)
    task.train_step(1, 0), task.train_step(1, 1)
    assert len(told) == 1 and "not recorded" in told[0] and "LAS-AT" in told[0] and task.replayed is None


def test_a_gpu_s_checkpoint_goes_on_without_one() -> None:
    given = ("at/c100_basic_gkl", "epochs=4", "batch_size=128")
    there, here, plain = with_rates_on_the_device(task_of(*given)[1]), task_of(*given)[1], task_of(*given)[1]
    trained(there, range(1, 2))
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    groups = [
        {k: v for k, v in task.optimizer.param_groups[0].items() if k != "params"} for task in (here, plain)
    ]
    assert groups[0] | {"lr": 0.0} == groups[1] | {"lr": 0.0} and type(groups[0]["lr"]) is float


def test_a_graph_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="graph=true records a GPU's work, and this run is on cpu"):
        task_of("at/c100_basic_gkl", "graph=true")


def test_how_a_step_is_executed_is_no_part_of_a_run_s_identity() -> None:
    known = {
        config_hash(compose("train", ["experiment=at/c100_basic_gkl", *own])) for own in ([], ["graph=false"])
    }
    assert len(known) == 1
