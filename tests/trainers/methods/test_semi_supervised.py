"""FixMatch and Mean-Teacher: two whole steps against the released loops in a straight line, in float64; resumed; on two processes."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.augment import to_float
from gkl.data.few_labels import digits_few
from gkl.distributed import all_reduce, rank
from gkl.models import create
from gkl.models.timm_network import set_sample_keys
from tests.gkl.losses.test_consistency import released
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate

ROWS = ("fixmatch_hard", "fixmatch_soft", "fixmatch_gkl", "mean_teacher_mse", "mean_teacher_gkl")
WARMUP, STEPS = 1, 6


def make_task(row: str, *own: str, drop_path: float = 0.2, device: str = "cpu") -> Training:
    words = [
        f"experiment=ssl/{row}", "scale=smoke", "precision=float64", "channels_last=false", "epochs=2", "data.steps_per_epoch=3",
        "data.unlabelled=2", f"schedule.warmup={WARMUP}", "method.confidence=0.12", "device=cpu", *own,
    ]  # fmt: skip
    config = {**compose("train", words), "initial": None}
    torch.manual_seed(0)
    model = create("vit_scan_patch2_8", 10, drop_path_rate=drop_path)
    data = digits_few(labels=20, draws="dkl", seed=0, steps_per_epoch=3, unlabelled=2)
    return build(config, data=data, model=model.double(), device=torch.device(device))


def layer(name: str, depth: int = 4) -> int:
    """Of a parameter, from the pictures up: embedding 0, blocks 1 to depth, the classifier depth + 1."""
    if name.startswith(("model.cls_token", "model.pos_embed", "model.patch_embed")):
        return 0
    return (
        int(name.split(".")[2]) + 1
        if name.startswith("model.blocks")
        else depth + (not name.startswith("model.norm"))
    )


def adamw(model: nn.Module, lr: float, decay: float, rate: float) -> torch.optim.AdamW:
    groups = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.endswith((".bias", "cls_token", "pos_embed"))
        groups.append(
            {
                "params": [parameter],
                "lr": lr * rate ** (5 - layer(name)),
                "weight_decay": 0.0 if plain else decay,
            }
        )
    return torch.optim.AdamW(groups, lr=lr)


def consistency(row: str, student: Tensor, teacher: Tensor) -> Tensor:
    if row == "fixmatch_hard":
        return F.cross_entropy(student, teacher.detach().argmax(1), reduction="none")
    if row == "fixmatch_soft":
        return -(teacher.detach().softmax(1) * student.log_softmax(1)).sum(1)
    if row == "mean_teacher_mse":
        return F.mse_loss(student.softmax(1), teacher.softmax(1), reduction="none").mean(1)
    alpha, beta = (0.1, 1.0) if row == "fixmatch_gkl" else (0.03, 0.02)
    return released(student, teacher, alpha, beta, 1.0, 1.0, held=False)


@pytest.mark.parametrize("row", ROWS)
def test_two_steps_are_the_released_ones(row: str) -> None:
    task = make_task(row)
    model: Any = copy.deepcopy(task.model)
    optimizer = adamw(model, lr=0.002, decay=0.0005, rate=0.75)
    base = [group["lr"] for group in optimizer.param_groups]
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    task.start_epoch(1)
    batches = [task.batch(1, step) for step in range(2)]
    with torch.no_grad():
        confident = [model(to_float(batch.weak).double()).softmax(1).max(1).values for batch in batches]
    cutoff = task.method.confidence = torch.cat(confident).median().item()  # some are and some are not
    logged = [task.train_step(1, step) for step in range(2)]

    for it, batch in enumerate(batches):
        factor = (
            it / WARMUP
            if it < WARMUP
            else max(0.0, math.cos(math.pi * 7 / 16 * (it - WARMUP) / (STEPS - WARMUP)))
        )
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        model.train()
        x, weak, strong = (to_float(images).double() for images in (batch.labelled, batch.weak, batch.strong))
        if row.startswith("fixmatch"):
            set_sample_keys(model, batch.keys)
            logits = model(torch.cat([x, weak, strong]))
            labelled, (teacher, student) = logits[: len(x)], logits[len(x) :].chunk(2)
        else:
            keys = batch.keys.split([8, 16, 16])
            set_sample_keys(model, keys[0])
            labelled = model(x)
            own = {name: p.data for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.data = shadow[name]
            with torch.no_grad():
                set_sample_keys(model, keys[1])
                teacher = model(weak)
            for name, p in model.named_parameters():
                p.data = own[name]
            set_sample_keys(model, keys[2])
            student = model(strong)
        mask = teacher.detach().softmax(1).max(1).values.ge(cutoff).double()
        assert 0 < mask.sum() < 16
        supervised = F.cross_entropy(labelled, batch.labels)
        unsupervised = (consistency(row, student, teacher) * mask).mean()
        optimizer.zero_grad()
        (supervised + unsupervised).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            shadow[name] = 0.99 * shadow[name] + 0.01 * p.detach()  # the smoke scale's decay
        torch.testing.assert_close(
            logged[it]["loss/consistency"], unsupervised.detach(), rtol=1e-10, atol=1e-12
        )
        right = (teacher.detach().argmax(1) == batch.hidden).double() * mask
        assert logged[it]["train/confident"].item() == pytest.approx(100 * mask.mean().item())
        assert logged[it]["train/confident_right"].item() == pytest.approx(100 * right.mean().item())
    for name, p in task.model.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=1e-9, atol=1e-11, msg=name)
    if row.startswith("mean_teacher"):
        for name, value in shadow.items():
            torch.testing.assert_close(task.averages["ema"].state[name], value, rtol=1e-9, atol=1e-11)


def test_mean_teacher_has_no_strong_view() -> None:
    batch = make_task("mean_teacher_mse").batches
    batch.start_epoch(1)
    made = batch.batch(1, 0)
    assert not made.weak.equal(made.strong)  # other crops
    assert make_task("mean_teacher_mse").batches.augment.operations == 0
    assert make_task("fixmatch_hard").batches.augment.operations == 3


def test_the_paper_s_stop_gradient_and_labels() -> None:
    official, paper = (
        compose("train", ["experiment=ssl/fixmatch_gkl", f"protocol={p}"]) for p in ("official", "paper")
    )
    assert official["consistency"]["weights_gradient"] and not paper["consistency"]["weights_gradient"]
    assert official["data"]["draws"] == "dkl" and paper["data"]["draws"] == "usb"


def test_the_recipe() -> None:
    """The released configs: usb_cv's and dkl_configs'."""
    config = compose("train", ["experiment=ssl/mean_teacher_gkl"])
    check(config, 1)
    assert config["epochs"] * config["data"]["steps_per_epoch"] == 204_800 and config["batch_size"] == 8
    assert config["schedule"] == {"_target_": "schedule/usb_cosine", "_partial_": True, "warmup": 5120}
    optimizer = {k: v for k, v in config["optimizer"].items() if k[0] != "_"}
    assert optimizer == {"lr": 5e-4, "weight_decay": 5e-4, "layer_decay": 0.5}
    assert (
        config["data"]["labels"] == 200
        and config["data"]["unlabelled"] == 1
        and config["method"]["confidence"] == 0.95
    )
    assert (
        config["averages"]["ema"]["decay"] == 0.999
        and config["evaluate"] == "ema"
        and config["augment"]["padding"] == 4
    )
    assert (config["consistency"]["alpha"], config["consistency"]["beta"]) == (0.03, 0.02)
    assert config["model"]["name"] == "vit_small_patch2_32" and config["precision"] == "float32"
    fixmatch = compose("train", ["experiment=ssl/fixmatch_gkl"])
    assert (fixmatch["consistency"]["alpha"], fixmatch["consistency"]["beta"]) == (0.1, 1.0)
    assert (
        fixmatch["averages"] == {}
        and fixmatch["evaluate"] == "last"
        and fixmatch["consistency"]["gamma"] == 1.0
    )


@pytest.mark.parametrize("row", ["fixmatch_gkl", "mean_teacher_mse"])
def test_a_run_goes_on_to_the_same_bits(row: str) -> None:
    def state(task: Training) -> dict[str, Any]:
        return copy.deepcopy(task.state_dict())

    whole = make_task(row)
    for epoch in (1, 2):
        whole.start_epoch(epoch)
        for step in range(3):
            whole.train_step(epoch, step)
            if (epoch, step) == (2, 0):
                kept = state(whole)
        row_of_history = whole.end_epoch(epoch)
    other = make_task(row)
    other.load_state_dict(kept)
    other.start_epoch(2)
    for step in (1, 2):
        other.train_step(2, step)
    assert other.end_epoch(2) == row_of_history
    for name, value in whole.model.state_dict().items():
        assert other.model.state_dict()[name].equal(value), name


def worker(folder: str) -> None:
    for row in ("fixmatch_gkl", "mean_teacher_gkl"):
        found = trained(make_task(row))
        if rank() == 0:
            torch.save(found, f"{folder}/{row}.pt")


def trained(task: Training) -> dict[str, Any]:
    task.start_epoch(1)
    shares = [task.train_step(1, step) for step in range(3)]
    logged = [{name: all_reduce(value) for name, value in row.items()} for row in shares]
    return {"logged": logged, "row": task.end_epoch(1), **copy.deepcopy(task.state_dict())}


@pytest.mark.long  # every row, on two processes
def test_two_processes_equal_one(tmp_path: Path) -> None:
    on_processes(worker, tmp_path, str(tmp_path))
    for row in ("fixmatch_gkl", "mean_teacher_gkl"):
        shared = torch.load(tmp_path / f"{row}.pt", weights_only=True)
        assert_equal(trained(make_task(row)), shared, row, rtol=1e-8, atol=1e-10)


def test_what_was_not_finite_can_be_looked_at() -> None:
    task = make_task("fixmatch_hard")
    task.start_epoch(1)
    found, batch = task.describe_batch(1, 0), task.batch(1, 0)
    assert found.keys() == batch._asdict().keys() and found["strong"].equal(batch.strong)


def test_rates_of_the_layers() -> None:
    task = make_task("fixmatch_hard")
    found = {p: group for group in task.optimizer.param_groups for p in group["params"]}
    task.start_epoch(1)
    task.train_step(1, 0)
    assert {group["lr"] for group in task.optimizer.param_groups} == {0.0}  # warm-up begins at nothing
    task.train_step(1, 1)
    for name, p in task.model.named_parameters():
        assert found[p]["lr"] == pytest.approx(0.002 * 0.75 ** (5 - layer(name))), name
        plain = p.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
        assert found[p]["weight_decay"] == (0.0 if plain else 0.0005), name


def test_small_batches_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate=2 has no effect on FixMatch, which takes"):
        make_task("fixmatch_hard", "accumulate=2")


@pytest.mark.parametrize(
    "words, message",
    [
        (("experiment=kd/c100_vanilla/resnet_20", "data=digits_few"), r"Distillation would train on the labels of all 1,437 pictures of digits_few, and not on 20 .*=2$"),
        (("experiment=ssl/fixmatch_gkl", "augment=basic"), "FixMatch needs few labels and their weak and strong views: data=..._few augment=weak_strong"),
        (("experiment=ssl/fixmatch_gkl", "augment=basic", "data=digits"), "FixMatch needs few labels"),
    ],
    ids=["every label", "plain views", "other data"],
)  # fmt: skip
def test_labels_that_are_hidden_are_not_trained_on(words: tuple[str, ...], message: str) -> None:
    """Once a baseline of few labels trained on all of them without a word."""
    config = {**compose("train", [*words, "scale=smoke"]), "initial": None}
    with pytest.raises(ValueError, match=message):
        build(config, device=torch.device("cpu"), data=instantiate(config["data"]))
