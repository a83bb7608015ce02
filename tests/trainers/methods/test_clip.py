"""CLIP: two whole steps against OpenCLIP's in a straight line, in float64; in micro-batches, resumed, on two processes; what it costs."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gkl.data.augment import to_float
from gkl.data.digits import digits_files
from gkl.distributed import all_reduce, rank
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from trainers.errors import ConfigError, RunError
from trainers.loop.console import Console
from trainers.loop.engine import fit
from trainers.loop.folder import RunFolder
from trainers.loop.training import Training
from trainers.methods.clip import Clip
from trainers.runs.compose import compose
from trainers.runs.cost import forward_flops, needed_flops, recorded_size
from trainers.runs.records import read_records
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate

pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
ROWS = {"baseline": (), "kl": ("loss.temperature=2.0",), "gkl": ()}
WARMUP, STEPS = 1, 44
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans") / "digits"
    digits_files(str(root))
    return root


@pytest.fixture(autouse=True)
def there(written: Path, tmp_path: Path) -> None:
    """The thousands of files that a training of each test would write anew."""
    (tmp_path / "digits").symlink_to(written)


@dataclass
class Drawn:
    """A teacher whose weights are drawn."""

    name: str
    cache: None = None

    def load(self, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
        from gkl.models.clip import clip

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            network = clip(self.name, normalisation=None)
        with torch.no_grad():
            network.logit_scale.fill_(3.0)
        return network, {"run": "drawn", "sha256": "none"}


def make_task(row: str, folder: Path, *own: str, precision: str = "float64", device: str = "cpu") -> Training:
    words = [
        f"experiment=clip/{row}", "scale=smoke", f"precision={precision}", "channels_last=false", "epochs=2", f"schedule.warmup={WARMUP}",
        "device=cpu", "workers=0", f"data.root={folder}/digits", *ROWS[row], *own,
    ]  # fmt: skip
    config = compose("train", words)
    check(config, 1)
    torch.manual_seed(0)
    given = {"teacher": Drawn(config["teacher"]["network"]["name"])} if row != "baseline" else {}
    return build(config, device=torch.device(device), data=instantiate(config["data"]), **given)


def plain(name: str, parameter: Tensor) -> bool:
    """Upstream's rule for what has no weight decay."""
    return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name


def gkl(s: Tensor, t: Tensor) -> Tensor:
    """Eq. 13 row by row: alpha = beta = 1, gamma = 0.3, of logits divided by t."""
    w = t.softmax(1) ** 0.3
    gaps = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    wmse = 0.25 * (w[:, :, None] * w[:, None, :] * gaps**2).sum((1, 2))
    return (wmse / (w.sum(1) ** 2).mean() - (t.softmax(1) * s.log_softmax(1)).sum(1)).mean()


def soft(s: Tensor, t: Tensor) -> Tensor:
    return -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("row", ROWS)
def test_two_steps_are_openclip_s(row: str, tmp_path: Path) -> None:
    task = make_task(row, tmp_path)
    student = copy.deepcopy(task.model.model)  # OpenCLIP's own
    names = dict(student.named_parameters())
    groups = [
        {"params": [p for n, p in names.items() if plain(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in names.items() if not plain(n, p)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-6)
    task.start_epoch(1)
    batches = [task.batch(1, step) for step in range(2)]
    logged = [task.train_step(1, step) for step in range(2)]
    for step, batch in enumerate(batches):
        rate = (
            (step + 1) / WARMUP
            if step < WARMUP
            else 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        )
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        x = to_float(batch.images).double()
        images, texts, scale = student(x, batch.tokens)
        ours = scale * images @ texts.T
        labels = torch.arange(64)
        loss = first = (F.cross_entropy(ours, labels) + F.cross_entropy(ours.T, labels)) / 2
        if row != "baseline":
            with torch.no_grad():
                a, b, other = task.method.taught_by.model(x, batch.tokens)
            theirs, t, term = other * a @ b.T, {"kl": 2.0, "gkl": 8.0}[row], {"kl": soft, "gkl": gkl}[row]
            second = (term(ours / t, theirs / t) + term(ours.T / t, theirs.T / t)) / 2
            loss = loss + second
            torch.testing.assert_close(logged[step]["loss/distillation"], second.detach(), rtol=1e-11, atol=0)
        torch.testing.assert_close(logged[step]["loss/contrastive"], first.detach(), rtol=1e-11, atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            student.logit_scale.clamp_(0, math.log(100))
    for name, p in task.model.model.named_parameters():
        torch.testing.assert_close(p, names[name], rtol=1e-9, atol=1e-11, msg=name)


def test_distillation_at_t_1_is_upstream_s_loss(tmp_path: Path) -> None:
    from open_clip.loss import DistillClipLoss

    task = make_task("kl", tmp_path, "loss.temperature=1.0")
    task.start_epoch(1)
    batch = task.batch(1, 0)
    x = to_float(batch.images).double()
    with torch.no_grad():
        own, theirs = task.model.model(x, batch.tokens), task.method.taught_by.model(x, batch.tokens)
        contrastive, distillation = DistillClipLoss()(*own, *theirs)
    logged = task.train_step(1, 0)
    torch.testing.assert_close(logged["loss/contrastive"], contrastive, rtol=1e-12, atol=0)
    torch.testing.assert_close(logged["loss/distillation"], distillation, rtol=1e-12, atol=0)


def trained(task: Training, steps: int = 2) -> dict[str, Any]:
    task.start_epoch(1)
    shares = [task.train_step(1, step) for step in range(steps)]
    logged = [{name: all_reduce(value) for name, value in row.items()} for row in shares]
    return copy.deepcopy({"logged": logged, **task.state_dict()})


@pytest.mark.parametrize("row", ["baseline", "gkl"])
def test_micro_batches_are_exact_and_of_their_size(row: str, tmp_path: Path) -> None:
    whole, parts = (make_task(row, tmp_path, f"accumulate={n}") for n in (1, 4))
    sizes: list[int] = []
    for network in (parts.model, parts.method.taught_by):
        if network is not None:
            network.model.visual.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert_equal(trained(whole), trained(parts), row, rtol=1e-10, atol=1e-12)
    assert {*sizes} == {16} and len(sizes) == 2 * 4 * (2 if row == "baseline" else 3)


@pytest.mark.parametrize("row", ["baseline", "gkl"])
def test_a_run_goes_on_to_the_same_bits(row: str, tmp_path: Path) -> None:
    whole = make_task(row, tmp_path, precision="float32")
    whole.start_epoch(1)
    for step in range(4):
        if step == 2:
            torch.save(whole.state_dict(), tmp_path / "kept.pt")
        whole.train_step(1, step)
    other = make_task(row, tmp_path, precision="float32")
    other.load_state_dict(torch.load(tmp_path / "kept.pt", weights_only=True))
    other.start_epoch(1)
    for step in (2, 3):
        other.train_step(1, step)
    for name, value in whole.model.state_dict().items():
        assert other.model.state_dict()[name].equal(value), name


def test_weights_go_on_with_other_tests_and_not_with_other_pairs(tmp_path: Path) -> None:
    """Once a test that came later would have had the whole training done anew."""
    task = make_task("baseline", tmp_path)
    state = task.state_dict()
    fewer = make_task("baseline", tmp_path)
    del fewer.data.tests["imagenet_r"]  # type: ignore[attr-defined]
    fewer.load_state_dict(state)
    fewer.load_state_dict({**state, "data": fewer.data.sha256})  # of a checkpoint from before
    fewer.data.__dict__.update(templates=fewer.data.templates[:3])  # type: ignore[attr-defined]
    fewer.data.__dict__.pop("trained_on")
    with pytest.raises(RunError, match="is no longer the data that this run was trained on"):
        fewer.load_state_dict(state)


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path: Path) -> None:
    task = make_task("gkl", tmp_path)
    before = copy.deepcopy(task.method.taught_by.state_dict())
    trained(task)
    assert all(before[name].equal(value) for name, value in task.method.taught_by.state_dict().items())
    assert all(p.grad is None for p in task.method.taught_by.parameters())
    state = task.state_dict()
    assert state["model"].keys() == task.model.state_dict().keys() and state["teacher"] == {
        "run": "drawn",
        "sha256": "none",
    }
    held = sum(v.numel() for v in state["model"].values())
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 8 * held * 3.2  # the weights and Adam's two averages
    with pytest.raises(ConfigError, match="another teacher"):
        task.load_state_dict({**state, "teacher": {"run": "drawn", "sha256": "other"}})


def worker(folder: str) -> None:
    for row, own in (("kl", ()), ("gkl", ("accumulate=2",))):
        found = trained(make_task(row, Path(folder), *own))
        if rank() == 0:
            torch.save(found, f"{folder}/{row}.pt")


@pytest.mark.long  # two processes that import OpenCLIP
def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = {row: trained(make_task(row, tmp_path)) for row in ("kl", "gkl")}
    on_processes(worker, tmp_path, str(tmp_path))
    for row, one in alone.items():
        shared = torch.load(tmp_path / f"{row}.pt", weights_only=True)
        assert_equal(one, shared, row, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("start", "end"), [(math.log(100), math.log(100)), (0.0, 0.0)])
def test_the_logit_scale_stays_within_its_bounds(start: float, end: float, tmp_path: Path) -> None:
    task = make_task("baseline", tmp_path)
    task.method.network.logit_scale.grad = None
    with torch.no_grad():
        task.method.network.logit_scale.fill_(start)

    def pushed(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, 1.0 if start == 0.0 else -1.0)

    task.method.network.logit_scale.register_hook(pushed)
    trained(task)
    assert task.method.network.logit_scale.item() == pytest.approx(end, abs=1e-15)


def test_half_precision_reaches_the_towers_alone(tmp_path: Path) -> None:
    task = make_task("gkl", tmp_path, precision="bf16")
    task.start_epoch(1)
    batch = task.batch(1, 0)
    images, texts = task.method.features(task.model, to_float(batch.images), batch.tokens)
    assert images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(images.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)
    exact = make_task("gkl", tmp_path, precision="float32")
    exact.start_epoch(1)
    one, other = task.train_step(1, 0), exact.train_step(1, 0)
    assert one["loss/contrastive"].item() == pytest.approx(other["loss/contrastive"].item(), rel=0.01)
    assert not one["loss/contrastive"].equal(other["loss/contrastive"])


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Attention as products that the counter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
    torch.backends.mha.set_fastpath_enabled(fast)


def flops(task: Training) -> float:
    task.start_epoch(1)
    with counted() as counter:
        task.train_step(1, 0)
    return float(counter.get_total_flops())


def test_a_distilled_step_is_a_plain_one_and_the_teacher_s_forward(tmp_path: Path) -> None:
    """Counted: 1.02 times what the student's step and the teacher's forward take, its similarities among these 2 %."""
    alone, taught = make_task("baseline", tmp_path), make_task("gkl", tmp_path)
    batch = taught.batch(1, 0)
    with counted() as counter, torch.no_grad():
        taught.method.taught_by(to_float(batch.images).double(), batch.tokens)
    assert flops(taught) <= 1.02 * (flops(alone) + counter.get_total_flops())
    assert flops(taught) > flops(alone) + counter.get_total_flops()


def test_the_plan_counts_what_a_step_takes(tmp_path: Path) -> None:
    for own, row in (((), "baseline"), ((), "gkl"), (("accumulate=4",), "gkl")):
        config = compose("train", [f"experiment=clip/{row}", "scale=smoke", *own])
        forwards = Clip.forwards(config, 1, 0)
        planned = 64 * sum(
            n * forward_flops(config[k] if k == "model" else config["teacher"]["network"], 8, 10)
            for k, n in forwards.items()
        )
        assert flops(make_task(row, tmp_path, *own)) == pytest.approx(planned, rel=0.03), (
            own,
            row,
        )  # pictures get no gradient


def test_what_recorded_runs_cost_can_be_counted() -> None:
    """A record's configuration says nothing of devices and micro-batches."""
    records = [r for r in read_records(ROOT / "results/runs/clip") if r["scale"] == "smoke"]
    assert len(records) >= 7
    assert all(needed_flops(r["config"], recorded_size(r)) > 1e9 for r in records)


def test_the_recipe() -> None:
    config = compose("train", ["experiment=clip/kl"])
    check(config, 8)
    assert (config["epochs"], config["batch_size"], config["data"]["samples"]) == (32, 8192, 15_000_000)
    assert (
        config["precision"] == "bf16" and config["schedule_every"] == "step" and config["evaluate"] == "last"
    )
    assert (
        config["schedule"]["warmup"] == 10_000
        and config["optimizer"]["lr"] == 5e-4
        and config["optimizer"]["weight_decay"] == 0.2
    )
    view = {k: config["augment"][k] for k in ("scale", "flip", "interpolation")}
    assert view == {"scale": [0.9, 1.0], "flip": 0.0, "interpolation": "bicubic"}
    assert (config["model"]["name"], config["teacher"]["network"]["name"]) == ("ViT-B-16", "ViT-L-14")
    assert (
        config["teacher"]["published"] == "open_clip/ViT-L-14/datacomp_xl_s13b_b90k"
        and config["averages"] == {}
    )
    assert compose("train", ["experiment=clip/gkl"])["loss"] == {
        "_target_": "loss/SimilarityGKL", "alpha": 1.0, "beta": 1.0, "gamma": 0.3, "temperature": 8.0,
    }  # fmt: skip


def test_the_optimizer_and_schedule_are_upstream_s(tmp_path: Path) -> None:
    from open_clip_train.scheduler import cosine_lr

    from gkl.optim.schedules import clip_cosine

    task = make_task("baseline", tmp_path)
    decayed = {p: group["weight_decay"] for group in task.optimizer.param_groups for p in group["params"]}
    assert {decayed[p] for p in task.model.parameters()} == {0.0, 0.2}
    for name, p in task.model.model.named_parameters():
        assert decayed[p] == (0.0 if plain(name, p) else 0.2), name
    theirs = cosine_lr(task.optimizer, 0.5, 10, 100)
    for step in range(100):
        assert theirs(step) == pytest.approx(0.5 * clip_cosine(step, 100, warmup=10), abs=1e-15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=clip_b16", "model.name=clip_64px_128"), "takes texts of 32 tokens out of 49,408"),
        (("model.name=ViT-B-77",), "OpenCLIP has no network 'ViT-B-77'"),
        (("model.name=RN50",), "has a ResNet's layers"),
        (("drop_last=false",), "set drop_last=true"),
        (
            ("data=digits_files",),
            "CLIP needs pictures with captions, got digits; data=digits_captions, datacomp",
        ),
        (("model=resnet_20",), "CLIP needs a network of two towers, got CifarResNet; model=clip_b16"),
    ],
)
def test_what_does_not_fit_is_a_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make_task("baseline", tmp_path, *words)


def test_a_teacher_comes_with_a_loss(tmp_path: Path) -> None:
    config = compose(
        "train",
        [
            "experiment=clip/baseline",
            "scale=smoke",
            "loss=soft_cross_entropy",
            f"data.root={tmp_path}/digits",
        ],
    )
    with pytest.raises(ValueError, match="a teacher and a loss come together"):
        build(config, device=torch.device("cpu"), data=instantiate(config["data"]))


def test_what_was_not_finite_can_be_looked_at(tmp_path: Path) -> None:
    task = make_task("baseline", tmp_path)
    task.start_epoch(1)
    found = task.describe_batch(1, 0)
    assert found["images"].shape == (64, 3, 8, 8) and found["image_features"].shape == (64, 48)
    torch.save(found, tmp_path / "batch.pt")
    torch.load(tmp_path / "batch.pt", weights_only=True)


def test_no_epochs_want_weights_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        make_task("baseline", tmp_path, "epochs=0")
    config = compose("train", ["experiment=clip/teacher"])
    assert config["epochs"] == 0 and config["initial"]["weights"] == "published"
    check(config, 1)
    assert instantiate(config["initial"]).file.name == "ViT-L-14-datacomp_xl_s13b_b90k.pt"


def test_a_run_of_no_epochs_measures_what_it_begins_with(tmp_path: Path) -> None:
    config = compose("train", ["experiment=clip/teacher", "scale=smoke", f"data.root={tmp_path}/digits"]) | {
        "epochs": 0
    }
    given = {"data": instantiate(config["data"]), "initial": Drawn("clip_scan_96")}
    task = build(config, device=torch.device("cpu"), **given)
    place = RunFolder(tmp_path / "run")
    place.open("lock").close()
    fit(
        task,
        epochs=0,
        folder=place,
        checkpoint_minutes=10,
        report=Console("", enabled=False, folder=place.path),
    )
    metrics, details = task.method.evaluate(
        headline="last", settings={}, folder=place.path, console=Console("", enabled=False, folder=place.path)
    )
    drawn = Drawn("clip_scan_96").load(10)[0].state_dict()
    assert all(task.model.state_dict()[name].equal(value) for name, value in drawn.items())
    assert metrics.keys() == {"imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_r"}
    assert details["tests"]["imagenet_r"] == {"n": 182, "classes": 5}
    assert task.method.origins() == {"initial": {"run": "drawn", "sha256": "none"}} and place.history() == []
