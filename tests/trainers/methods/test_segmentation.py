"""Segmentation alone and APD: two whole steps against the released loop in a straight line, in float64; resumed; on two processes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.augment import Views
from gkl.data.mosaics import digits_mosaics
from gkl.distributed import all_reduce, rank
from gkl.models import create
from gkl.models.timm_network import set_sample_keys
from gkl.rng import sample_keys
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build, check

ROWS = ("baseline", "apd_kl", "apd_gkl")
STEPS, CARDS = 3, 2
NETWORK = {"width": 8, "head": 16}


class Given:
    """A teacher that is there."""

    cache = None

    def load(self, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(5)
        network = create("pspnet_18", num_classes, **NETWORK)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
        return network, {"sha256": "0"}


def make_task(row: str, *own: str, device: str = "cpu") -> Training:
    words = [
        f"experiment=seg/{row}", "scale=smoke", "precision=float64", "channels_last=false", "epochs=2", "batch_size=4",
        f"bn_groups={CARDS}", "device=cpu", "workers=0", "optimizer.lr=0.005", "optimizer.heads=10.0",
        "augment.zoom=[0.75,1.5]", *own,
    ]  # fmt: skip
    config = compose("train", words)
    torch.manual_seed(0)
    model = create("pspnet_18", 10, **NETWORK)
    data = digits_mosaics(4 * STEPS, 6, image_size=33)
    given = {} if row == "baseline" else {"teacher": Given()}
    torch.manual_seed(1)
    return build(config, data=data, model=model.double(), device=torch.device(device), **given)


# --- the released loop ------------------------------------------------------------------------------------------------


def large(x: Tensor) -> Tensor:
    return F.interpolate(x, (33, 33), mode="bilinear", align_corners=True)


def by_kmeans(pred: Tensor, soft: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One card: KL of the similarities, cross-entropy of the teacher's, alignment; class by class as the released code does."""
    near = F.interpolate(target[:, None].float(), pred.shape[2:], mode="nearest")[:, 0]
    pred, soft = F.normalize(pred, dim=1), F.normalize(soft, dim=1)
    classes = [int(c) for c in near.unique() if c != 255]
    both = []
    for x in (pred, soft):
        means = [x.movedim(1, -1)[near == c].mean(0) for c in classes]
        both.append(F.normalize(torch.stack(means), dim=1))
    out = [10.0 * F.conv2d(x, c[:, :, None, None]) for x, c in zip((pred, soft), both, strict=True)]
    whole = torch.zeros(len(pred), 10, *pred.shape[2:], dtype=pred.dtype)
    for n, c in enumerate(classes):
        whole[:, c] = out[1][:, n]
    learned = F.cross_entropy(large(whole), target, ignore_index=255)
    agreement = nn.KLDivLoss()(out[0].log_softmax(1), out[1].detach().softmax(1))
    alignment = 0.5 * (1 - (both[0] * both[1].detach()).sum(1)).mean()
    return agreement, learned, alignment


def released_gkl(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 13 of pixels as the released code writes it, W^2 averaged over them; divided by C."""
    s, t = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    weights = t.softmax(1) ** 0.3
    pairs = weights[:, :, None] * weights[:, None]
    differences = (t[:, :, None] - t[:, None]) - (s[:, :, None] - s[:, None])
    wmse = 0.25 * (differences**2 * pairs).sum() / pairs.sum()
    return (wmse - (t.softmax(1) * s.log_softmax(1)).sum(1).mean()) / 10


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("row", ROWS)
def test_two_steps_are_the_released_ones(row: str) -> None:
    task = make_task(row)
    method: Any = task.method
    model: Any = copy.deepcopy(task.model)
    heads = [p for name, p in model.named_parameters() if name.startswith(("ppm", "cls", "aux"))]
    stages = [p for name, p in model.named_parameters() if name.startswith("layer")]
    given: Any = None
    if row != "baseline":
        own, given, teacher = (
            copy.deepcopy(m) for m in (method.own_transform, method.teacher_transform, method.taught_by)
        )
        heads += list(own.parameters())
        adam = torch.optim.Adam(given.parameters(), 1e-5, [0.9, 0.99])
    sgd = torch.optim.SGD(
        [{"params": stages, "lr": 0.005}, {"params": heads, "lr": 0.05}],
        lr=0.005,
        momentum=0.9,
        weight_decay=1e-4,
    )
    task.start_epoch(1)
    batches = [task.batch(1, step) for step in range(2)]
    logged = [task.train_step(1, step) for step in range(2)]
    for it, batch in enumerate(batches):
        x, y = batch.images.double(), batch.labels
        assert (y == 255).any() and x.shape == (4, 3, 33, 33)
        factor = (1 - it / (2 * STEPS)) ** 0.9
        for group, rate in zip(sgd.param_groups, (0.005, 0.05), strict=True):
            group["lr"] = rate * factor
        model.train()
        set_sample_keys(model, sample_keys(0, 1, 4 * it + torch.arange(4), "inside_the_network"))
        maps = model.forward_maps(x)
        cards = [slice(0, 2), slice(2, 4)]
        main, aux = (
            sum(F.cross_entropy(large(m[c]), y[c], ignore_index=255) for c in cards) / 2 for m in maps[:2]
        )
        loss = main + 0.4 * aux
        if row != "baseline":
            with torch.no_grad():
                taught = teacher.forward_maps(x)
            student, target = large(maps.logits), large(taught.logits)
            kl = nn.KLDivLoss()(student.log_softmax(1), target.softmax(1))
            divergence = kl if row == "apd_kl" else released_gkl(student, target)
            s, t = own(maps.features), given(taught.features)
            parts = [by_kmeans(s[c], t[c], y[c]) for c in cards]
            agreement, learned, alignment = (sum(p) / 2 for p in zip(*parts, strict=True))
            adam.zero_grad()
            learned.backward(retain_graph=True)
            adam.step()
            loss = loss + 10 * divergence + 10 * agreement + 10 * alignment
            for name, value in (("divergence", divergence), ("centres", agreement), ("alignment", alignment)):
                torch.testing.assert_close(
                    logged[it][f"loss/{name}"], 10 * value.detach(), rtol=1e-9, atol=1e-10
                )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        torch.testing.assert_close(logged[it]["loss/labels"], main.detach(), rtol=1e-9, atol=1e-10)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], value, rtol=1e-7, atol=1e-10, msg=name)
    if given is not None:
        for mine, theirs in ((method.own_transform, own), (method.teacher_transform, given)):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        before = make_task(row).method.teacher_transform[0].weight
        moved = (method.teacher_transform[0].weight - before).abs().max().item()
        assert moved == pytest.approx(2e-5, rel=0.1)  # Adam's, which never decays
        assert all(p.grad is None for p in method.taught_by.parameters())


def test_the_recipe() -> None:
    """config/ade20k/ade20k_release_psp18_psp101.yaml, which recipes.md quotes."""
    config = compose("train", ["experiment=seg/apd_gkl"])
    check(config, 1)
    assert (config["epochs"], config["batch_size"], config["bn_groups"]) == (100, 8, 4)
    assert {k: v for k, v in config["optimizer"].items() if k[0] != "_"} == {
        "lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False, "decay_batch_norm": True, "heads": 10.0,
    }  # fmt: skip
    assert config["schedule"]["_target_"] == "schedule/poly" and config["schedule"]["power"] == 0.9
    assert config["schedule_every"] == "step" and config["drop_last"] and config["evaluate"] == "last"
    augment = config["augment"]
    assert (augment["zoom"], augment["rotation"], augment["blur"], augment["flip"]) == (
        [0.5, 2.0],
        10,
        0.5,
        0.5,
    )
    data = config["data"]
    assert (data["_target_"], data["image_size"], data["long_side"], data["classes"]) == (
        "data/ade20k",
        473,
        512,
        150,
    )
    assert {k: v for k, v in config["method"].items() if k[0] != "_"} == {
        "aux_weight": 0.4, "mirrored": True, "divergence_weight": 10.0, "centres_weight": 10.0, "align_weight": 10.0, "sharpness": 10.0,
        "transform_lr": 1e-5, "count_ignored": True,
    }  # fmt: skip
    assert config["divergence"] == {"_target_": "divergence/GKL", "alpha": 1.0, "beta": 1.0, "gamma": 0.3}
    assert (config["model"]["name"], config["teacher"]["network"]["name"]) == ("pspnet_18", "pspnet_101")
    assert (
        config["teacher"]["weights"] == "published"
        and config["initial"]["published"] == "resnet18-imagenet.pth"
    )
    assert config["model"]["normalisation"] == "imagenet"
    kl = compose("train", ["experiment=seg/apd_kl"])
    assert {**kl, "divergence": 0, "experiment": 0} == {**config, "divergence": 0, "experiment": 0}


@pytest.mark.parametrize("row", ["baseline", "apd_gkl"])
def test_a_run_goes_on_to_the_same_bits(row: str) -> None:
    whole = make_task(row)
    for epoch in (1, 2):
        whole.start_epoch(epoch)
        for step in range(STEPS):
            whole.train_step(epoch, step)
            if (epoch, step) == (2, 0):
                kept = copy.deepcopy(whole.state_dict())
        row_of_history = whole.end_epoch(epoch)
    other = make_task(row)
    other.load_state_dict(kept)
    other.start_epoch(2)
    for step in range(1, STEPS):
        other.train_step(2, step)
    assert other.end_epoch(2) == row_of_history
    for name, value in whole.state_dict()["model"].items():
        assert other.model.state_dict()[name].equal(value), name
    if row != "baseline":
        for name, value in whole.method.teacher_transform.state_dict().items():
            assert other.method.teacher_transform.state_dict()[name].equal(value), name


def worker(folder: str) -> None:
    for row, own in (("apd_kl", ()), ("apd_gkl", ("method.count_ignored=false",))):
        found = trained(make_task(row, *own))
        if rank() == 0:
            torch.save(found, f"{folder}/{row}.pt")


def trained(task: Training) -> dict[str, Any]:
    task.start_epoch(1)
    shares = [task.train_step(1, step) for step in range(2)]
    logged = [{name: all_reduce(value) for name, value in row.items()} for row in shares]
    history = task.end_epoch(1)
    metrics, details = task.method.evaluate(headline="last", settings={}, folder=Path(), console=None)  # type: ignore[arg-type]
    return {
        "logged": logged,
        "row": history,
        "metrics": metrics,
        "iou": details["iou"],
        **copy.deepcopy(task.state_dict()),
    }


@pytest.mark.long  # two processes
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Batch norm over the pictures of both, losses over a card's."""
    on_processes(worker, tmp_path, str(tmp_path))
    for row, own in (("apd_kl", ()), ("apd_gkl", ("method.count_ignored=false",))):
        shared = torch.load(tmp_path / f"{row}.pt", weights_only=True)
        assert_equal(trained(make_task(row, *own)), shared, row, rtol=1e-7, atol=1e-9)


def test_ignored_pixels_count_or_not() -> None:
    """Without them the divergence is the mean over labelled pixels, whatever both networks say elsewhere."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (4, 9, 9))
    labels[torch.rand(labels.shape) < 0.3] = 255
    student, teacher = torch.randn(2, 4, 10, 9, 9, dtype=torch.float64)
    marked = labels != 255
    for row in ("apd_kl", "apd_gkl"):
        term: Any = make_task(row).method.divergence
        some = term(student, teacher, marked).sum() / marked.sum()
        rows = [x.movedim(1, -1)[marked][:, :, None, None] for x in (student, teacher)]
        torch.testing.assert_close(some, term(*rows).mean())
        elsewhere = torch.where(marked[:, None], teacher, float("nan"))
        if row == "apd_gkl":
            torch.testing.assert_close(term(student, elsewhere, marked), term(student, teacher, marked))
        assert term(student, teacher).mean() != some


def test_what_it_cannot_train_is_one_line() -> None:
    config = compose("train", ["experiment=seg/baseline", "scale=smoke", "device=cpu", "workers=0"])
    data = digits_mosaics(8, 2, image_size=33)
    with pytest.raises(
        ValueError, match=r"segmentation needs a network of gkl\.models\.pspnet, got WideResNet"
    ):
        build(config, data=data, model=create("wrn_10_1", 10), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accumulate=2 has no effect on Segmentation, which takes"):
        make_task("baseline", "accumulate=2")
    with pytest.raises(ValueError, match="digits_mosaics needs augment=dense_crop, got Views"):
        data.batches(augment=Views())
    with pytest.raises(ValueError, match=r"data\.image_size=64 must be 8 n \+ 1 \(65\)"):
        digits_mosaics(1, 1, image_size=64)
