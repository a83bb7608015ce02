"""Distillation on pictures in files: the recipes of the ImageNet tables, and whole trainings: resume, processes, mixing."""

import copy
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from timm.scheduler import CosineLRScheduler

from gkl.data.digits import digits_files
from gkl.data.mixing import Mixing, box
from gkl.distributed import rank
from gkl.losses.objectives import BinaryCrossEntropy
from gkl.models import create, published
from gkl.models.timm_network import KeyedDropPath, set_sample_keys
from gkl.optim.schedules import timm_cosine, warmup_cosine
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from tests.trainers.methods.test_distillation import ended, train
from trainers.errors import ConfigError
from trainers.loop.training import Training
from trainers.runs.compose import choices, compose
from trainers.runs.paths import record_path
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate

# Steps of the paper's own ImageNet networks, in float64 and in several processes.
pytestmark = pytest.mark.long

IN = {
    "epochs": 100,
    "batch_size": 512,
    "bn_groups": 8,
    "drop_last": False,
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "schedule.drops": [31, 61, 91],
    "schedule.factor": 0.1,
    "data._target_": "data/imagenet",
    "data.image_size": 224,
    "data.resize": 256,
    "augment.scale": [0.08, 1.0],
    "augment.flip": 0.5,
    "augment.interpolation": "bilinear",
    "precision": "tf32",
    "model.normalisation": "imagenet",
    "evaluate": "last",
}
LT = {
    **IN,
    "epochs": 90,
    "batch_size": 128,
    "bn_groups": 4,
    "drop_last": True,
    "optimizer.lr": 0.05,
    "optimizer.weight_decay": 5e-4,
    "schedule.warmup": 10,
    "data._target_": "data/imagenet_lt",
    "evaluate": "best",
}
del LT["schedule.drops"], LT["schedule.factor"]
STRONG = {
    "epochs": 300, "batch_size": 2048, "bn_groups": 8, "optimizer._target_": "optimizer/lamb", "optimizer.lr": 5e-3,
    "optimizer.weight_decay": 0.02, "schedule.warmup": 5, "schedule.start": 2e-4, "data.resize": 235, "data.interpolation": "bicubic",
    "augment.interpolation": "random", "augment.rand_augment": "rand-m7-mstd0.5", "augment.repeats": 3, "mixing.mixup": 0.1,
    "mixing.cutmix": 1.0, "mixing.smoothing": 0.0, "label_loss._target_": "label_loss/BinaryCrossEntropy", "precision": "fp16",
    "model.timm_options": {"drop_path_rate": 0.05}, "distiller.label_weight": 1.0, "evaluate": "last",
}  # fmt: skip
R, M = "resnet34_resnet18", "resnet50_mobilenetv1"
X18, X50, S50 = "resnext101_resnet18", "resnext101_resnet50", "resnet50_resnet50"
GKL = {
    "gamma": 0.3,
    "weights": "class",
    "temperature": 1.0,
    "prior_temperature": 1.0,
    "warmup": 0,
    "normaliser": "group",
    "label_weight": 1.0,
}
# experiment -> its method's own values
RECIPES: dict[str, dict[str, Any]] = {
    f"kd/in_gkl/{R}": {**GKL, "alpha": 0.5, "beta": 1.0, "gamma": 0.6, "warmup": 5},
    f"kd/in_gkl/{M}": {**GKL, "alpha": 1.0, "beta": 4.0, "gamma": 0.5, "warmup": 5},
    **{f"kd/in_ikl/{p}": {"alpha": a, "beta": b, "temperature": 1.0, "weights": "class", "weights_temperature": 1.0, "warmup": 1}
       for p, a, b in ((R, 0.5, 1.0), (M, 1.0, 4.0))},
    f"kd/in_dkd/{R}": {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "warmup": 1},
    f"kd/in_dkd/{M}": {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup": 1},
    f"kd/in_reviewkd/{R}": {"weight": 1.0, "warmup": 1, "max_width": 512, "student_before": True},
    f"kd/in_reviewkd/{M}": {"weight": 8.0, "warmup": 1, "max_width": 512, "student_before": True},
    **{f"kd/in_kd/{p}": {"temperature": 1.0, "weight": 0.5, "label_weight": 0.5} for p in (R, M)},
    **{f"kd/in_at/{p}": {"weight": 1000.0, "stages": s} for p, s in ((R, "all"), (M, [[2, 1], [3, 2], [4, 3]]))},
    **{f"kd/in_ofd/{p}": {"weight": 1e-4, "kernel_size": 1, "stages": s}
       for p, s in ((R, "all"), (M, [[2, 2], [3, 3], [4, 4]]))},
    **{f"kd/in_crd/{p}": {"negatives": 16384, "weight": 0.8, "temperature": 0.07, "momentum": 0.5} for p in (R, M)},
    f"kd/lt_gkl/{X18}": {**GKL, "alpha": 4.0, "beta": 4.0},
    f"kd/lt_gkl/{X50}": {**GKL, "alpha": 4.0, "beta": 3.0},
    f"kd/lt_gkl/{S50}": {**GKL, "alpha": 1.0, "beta": 1.0},
    **{f"kd/lt_{m}/{p}": {"weight": w, "label_weight": 1.0, **({"temperature": 1.0} if m == "kl" else {})}
       for m in ("kl", "jsd") for p, w in ((X18, 4.0), (X50, 3.0), (S50, 1.0))},
    **{f"kd/lt_ikl/{p}": {"alpha": a, "beta": b, "temperature": 1.0, "weights": "sample", "weights_temperature": 100.0, "warmup": 0}
       for p, a, b in ((X18, 4.0, 4.0), (X50, 4.0, 3.0), (S50, 1.0, 1.0))},
    "kd/strong_kd/beitv2_resnet50": {"temperature": 1.0, "weight": 1.0},
    "kd/strong_dkd/beitv2_resnet50": {"alpha": 1.0, "beta": 2.0, "temperature": 1.0, "warmup": 0},
    "kd/strong_dist/beitv2_resnet50": {"inter": 1.0, "intra": 1.0, "temperature": 1.0},
    "kd/strong_gkl/beitv2_resnet50": {**GKL, "alpha": 0.5, "beta": 1.0, "gamma": 0.6, "warmup": 5},
}  # fmt: skip
NETWORKS = {
    R: ("imagenet_resnet_34", "imagenet_resnet_18"), M: ("imagenet_resnet_50", "mobilenet_v1"),
    X18: ("imagenet_resnext_101_32x4d", "imagenet_resnet_18"), X50: ("imagenet_resnext_101_32x4d", "imagenet_resnet_50"),
    S50: ("imagenet_resnet_50", "imagenet_resnet_50"), "beitv2_resnet50": ("beitv2_large_patch16_224", "resnet50"),
}  # fmt: skip


def flat(config: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        config = config[key]
    return config


def test_every_experiment_has_its_recipe() -> None:
    kinds = {name for name in choices("experiment") if name.startswith(("kd/in_", "kd/lt_", "kd/strong_"))}
    assert kinds == {name.rpartition("/")[0] for name in RECIPES} | {
        "kd/in_vanilla",
        "kd/lt_vanilla",
        "kd/strong_vanilla",
    }
    assert set(NETWORKS) == {
        name for group in ("imagenet", "imagenet_lt", "strong") for name in choices(f"pair/{group}")
    }


@pytest.mark.parametrize("experiment", RECIPES)
def test_paper_scale_is_the_recipe(experiment: str) -> None:
    config = compose("train", [f"experiment={experiment}"])
    check(config, 1)
    common = STRONG if "/strong_" in experiment else LT if "/lt_" in experiment else IN
    wanted = {**common, **{f"distiller.{key}": value for key, value in RECIPES[experiment].items()}}
    assert {key: flat(config, key) for key in wanted} == wanted
    pair = experiment.rpartition("/")[2]
    assert (config["teacher"]["network"]["name"], config["model"]["name"]) == NETWORKS[pair]
    assert config["teacher"]["weights"] == ("own" if "/lt_" in experiment else "published")
    for scale in ("small", "smoke"):
        shrunk = compose("train", [f"experiment={experiment}", f"scale={scale}"])
        check(shrunk, 1)
        assert shrunk["model"]["name"] == config["model"]["name"]
    text = compose("train", [f"experiment={experiment}", "protocol=paper"])["distiller"].get("normaliser")
    assert text == ("batch" if "_gkl/" in experiment else None)


def test_learning_rates() -> None:
    """ImageNet-LT: epochs 0, 9, 10, 89 of the authors' script. Strong: timm's scheduler, epoch by epoch."""
    rates = [0.05 * warmup_cosine(e, 90, warmup=10) for e in (1, 10, 11, 90)]
    assert rates == pytest.approx([0.005, 0.05, 0.049981, 1.880e-5], rel=1e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    timms = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(1, 301):
        timms.step(epoch - 1)
        ours = 5e-3 * timm_cosine(epoch, 300, warmup=5, start=2e-4, end=2e-4)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch


# --- mixing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_mixing_blends_pictures_and_labels_alike(mixup: float, cutmix: float) -> None:
    """A picture of ones among zeros: its share of every mixed picture is its label's share of the target."""
    x = torch.zeros(6, 3, 8, 8, dtype=torch.float64)
    x[0] = 1.0
    labels = torch.tensor([1, 0, 0, 0, 0, 0])
    mixing = Mixing(mixup, cutmix)
    options: dict[str, Any] = {"num_classes": 3, "first_group": 0, "group_size": 3}
    for step in range(20):
        mixed, target = mixing(x, labels, draw=(0, 1, step), **options)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), target[:, 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(target.sum(1), torch.ones(6).double())
        assert target[0, 1] + target[2, 1] == pytest.approx(1.0), (
            "the other share lies in its mirror of the group"
        )
        assert not target[3:, 1].any(), "groups do not see each other"
        again, _ = mixing(x[3:], labels[3:], draw=(0, 1, step), **{**options, "first_group": 1})
        assert torch.equal(again, mixed[3:]), (
            "a process that holds the second group draws what one process draws"
        )
    assert not torch.equal(mixed, mixing(x, labels, draw=(0, 2, 19), **options)[0])


def test_mixing_smooths_and_refuses() -> None:
    _, target = Mixing(1.0, 0.0, smoothing=0.1)(torch.rand(2, 3, 4, 4), torch.tensor([0, 0]), num_classes=5, first_group=0,
                                                group_size=2, draw=(0, 1, 0))  # fmt: skip
    torch.testing.assert_close(target, torch.tensor([[0.92, 0.02, 0.02, 0.02, 0.02]] * 2))
    with pytest.raises(ValueError, match="one of them above 0, .* got 0, 0 and 0"):
        Mixing(0, 0, 0)
    import random

    for seed in range(50):
        top, bottom, left, right = box(10, 20, 0.6, random.Random(seed))
        assert 0 <= top <= bottom <= 10 and 0 <= left <= right <= 20


def test_binary_cross_entropy_is_timms() -> None:
    torch.manual_seed(0)
    z, target = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        BinaryCrossEntropy()(z, target).mean(), TimmBinaryCrossEntropy(smoothing=0.0)(z, target)
    )
    y = torch.tensor([5, 0, 1, 2])
    timms = TimmBinaryCrossEntropy(smoothing=0.0)(z.float(), y)
    torch.testing.assert_close(BinaryCrossEntropy()(z.float(), y).mean(), timms)


# --- timm's networks -----------------------------------------------------------------------------------------------------


def test_timms_networks_are_normalised_and_drop_by_key() -> None:
    torch.manual_seed(0)
    network = create("resnet10t", 7, "imagenet", {"drop_path_rate": 0.5})
    x = torch.rand(4, 3, 32, 32)
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (network.model.default_cfg["mean"], network.model.default_cfg["std"])
    )
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), network.model((x - mean) / std), rtol=1e-5, atol=1e-5)
        assert not network.forward_taps(x).features and torch.equal(
            network.forward_taps(x).logits, network(x)
        )
    drops = [m for m in network.modules() if isinstance(m, KeyedDropPath)]
    assert (
        drops
        and drops[-1].drop == 0.5
        and not any(isinstance(m, timm.layers.DropPath) for m in network.modules())
    )
    keys = torch.arange(2000)
    set_sample_keys(network, keys)
    last = drops[-1].train()
    out = last(torch.ones(2000, 1, 2, 2))
    assert set(out.unique().tolist()) == {0.0, 2.0} and 900 < int((out[:, 0, 0, 0] == 0).sum()) < 1100
    set_sample_keys(network, keys.flip(0))
    assert torch.equal(last(torch.ones(2000, 1, 2, 2)), out.flip(0)), "a picture's draw is its own"


def test_features_are_refused_where_there_are_none(tmp_path: Path) -> None:
    words = [f"experiment=kd/in_at/{R}", "model=timm_resnet_50", "model@teacher.network=beitv2_large", "scale=smoke",
             "teacher.weights=published", f"teacher.folder={tmp_path}", "teacher.published=beit.safetensors"]  # fmt: skip
    config = compose("train", words)
    save_file(create("beitv2_large_patch16_224", 10, "imagenet", config["teacher"]["network"]["timm_options"]).model.state_dict(),
              tmp_path / "beit.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="AttentionTransfer needs the stages of both networks"):
        made(config, tmp_path, image_size=32)


# --- published weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder on a real local web server."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_torchvisions_weights_are_fetched_once_and_checked(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    folder, address = served
    torch.save(create("imagenet_resnet_18", 1000).state_dict(), folder / "weights")
    data = (folder / "weights").read_bytes()
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(data)
    monkeypatch.setattr(published, "_torchvision", lambda weights: f"{address}/{name}")
    words = ["experiment=kd/in_kd/resnet34_resnet18", f"teacher.folder={tmp_path}/teachers",
             "teacher.published=torchvision/ResNet18_Weights.IMAGENET1K_V1", "teacher.network.name=imagenet_resnet_18"]  # fmt: skip
    teacher = instantiate(compose("train", words)["teacher"])
    network, origin = teacher.load(1000)
    assert origin["published"] == "torchvision/ResNet18_Weights.IMAGENET1K_V1" and network.num_classes == 1000
    (folder / name).unlink()
    teacher.load(1000)  # from its own folder
    file = tmp_path / "teachers" / name
    file.unlink()
    (folder / name).write_bytes(data[:-1] + b"x")
    with pytest.raises(ConfigError, match="are missing and cannot be fetched .*hash.*; put the file there"):
        teacher.check()
    assert not list((tmp_path / "teachers").iterdir())


def test_names_of_published_files() -> None:
    assert str(published.file_name("torchvision/ResNet34_Weights.IMAGENET1K_V1")) == "resnet34-b627a593.pth"
    assert str(published.file_name("torchvision/ResNet50_Weights.IMAGENET1K_V1")) == "resnet50-0676ba61.pth"
    assert str(published.file_name("resnet56_vanilla")) == "resnet56_vanilla/ckpt_epoch_240.pth"
    assert str(published.file_name("mine/model.pt")) == "mine/model.pt"


# --- whole trainings -----------------------------------------------------------------------------------------------------


def words(kind: str, folder: Path, *more: str) -> dict[str, Any]:
    """A WRN-10-1 of a WRN-16-2 (strong: a small ResNet of timm's) on the long-tailed digits in files of 16x16."""
    own = {
        "strong": ["model.name=resnet10t", "model.timm_options.drop_path_rate=0.3", "distiller.warmup=0"]
    }.get(kind, ["model.name=wrn_10_1", "model.normalisation=null"])
    experiment = {
        "strong": "kd/strong_gkl/beitv2_resnet50",
        "lt": f"kd/lt_gkl/{X18}",
        "in_at": f"kd/in_at/{R}",
    }[kind]
    file = folder / "teacher.pt"
    if not file.exists():
        torch.manual_seed(7)
        torch.save(create("wrn_16_2", num_classes=10).state_dict(), file)
    teacher = ["teacher.network.name=wrn_16_2", "teacher.network.normalisation=null", "teacher.weights=published",
               "teacher.published=teacher.pt", f"teacher.folder={folder}", "teacher.cache=null",
               *(["~teacher.network.timm_options"] if kind == "strong" else [])]  # fmt: skip
    return compose(
        "train",
        [f"experiment={experiment}", "scale=smoke", *own, *teacher, "precision=float64", "batch_size=32", "bn_groups=4",
         "channels_last=false", "epochs=4", f"data.root={folder}/digits", "data.image_size=16", "workers=2", *more],
    )  # fmt: skip


def made(config: dict[str, Any], folder: Path, image_size: int = 16) -> Training:
    check(config, 1)
    torch.manual_seed(5)
    data = digits_files(str(folder / "digits"), image_size, largest=20, smallest=4)
    model = instantiate(config["model"], num_classes=10).to(torch.float64)
    return build(config, data=data, model=model, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["lt", "strong", "in_at"])
def test_stopped_within_an_epoch_and_gone_on(kind: str, tmp_path: Path) -> None:
    """Bit for bit, with two worker processes before and one after."""
    task = made(words(kind, tmp_path), tmp_path)
    train(task, 1, range(task.steps_per_epoch))
    task.end_epoch(1)
    train(task, 2, range(1))
    torch.save(task.state_dict(), tmp_path / "checkpoint.pt")
    for step in range(1, task.steps_per_epoch):
        task.train_step(2, step)
    resumed = made(words(kind, tmp_path, "workers=1"), tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    train(resumed, 2, range(1, task.steps_per_epoch))
    assert_equal(ended(task, 2), ended(resumed, 2), kind, rtol=0, atol=0)


def twice(task: Training) -> dict[str, Any]:
    train(task, 2, range(task.steps_per_epoch))
    return copy.deepcopy(ended(task, 2))


def worker(folder: str) -> None:
    for kind in ("lt", "strong", "in_at"):
        state = twice(made(words(kind, Path(folder)), Path(folder)))
        if rank() == 0:
            torch.save(state, f"{folder}/{kind}.pt")


def test_two_processes_and_micro_batches_equal_one(tmp_path: Path) -> None:
    """Streams, validation, prior, mixing, stochastic depth; the last batch of `lt` is dropped, others' is short."""
    made(words("lt", tmp_path), tmp_path)  # writes teacher and digits
    on_processes(worker, tmp_path, str(tmp_path))
    for kind in ("lt", "strong", "in_at"):
        shared = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        one = twice(made(words(kind, tmp_path), tmp_path))
        assert_equal(one, shared, kind, rtol=1e-8, atol=1e-10)
        parts = twice(made(words(kind, tmp_path, "accumulate=4"), tmp_path))
        assert_equal(one, parts, kind, rtol=1e-8, atol=1e-10)


def test_long_tailed_accuracies_stand_in_history_and_metrics(tmp_path: Path) -> None:
    task = made(words("lt", tmp_path), tmp_path)
    rows = []
    for epoch in (1, 2):
        train(task, epoch, range(task.steps_per_epoch))
        rows.append(task.end_epoch(epoch))
    assert {"test/top1", "test/medium", "test/few", "test/all"} <= rows[0].keys() and "test/many" not in rows[
        0
    ]
    metrics, details = task.method.evaluate(headline="best", settings={}, folder=tmp_path, console=None)  # type: ignore[arg-type]
    best = max(rows, key=lambda row: row["test/top1"])
    for name in ("top1", "medium", "few", "all"):
        assert metrics[f"{name}_best"] == metrics[name] == best[f"test/{name}"], name
    assert details["weights"] == "best"


def test_a_run_names_what_is_missing_before_it_starts(tmp_path: Path) -> None:
    config = compose(
        "train", [f"experiment=kd/lt_kl/{X18}", f"data.root={tmp_path}", f"data.lists={tmp_path}/lists"]
    )
    with pytest.raises(ConfigError, match=r"no list .*ImageNet_LT_train.txt; take ImageNet-LT's three lists"):
        instantiate(config["data"])
    config = compose(
        "train", [f"experiment=kd/lt_kl/{X18}", "assessment=renditions", f"assessment.root={tmp_path}"]
    )
    with pytest.raises(
        ValueError,
        match=r"no ImageNet-R at .*imagenet-r and no ImageNet-Sketch at .*imagenet-sketch; unpack their",
    ):
        instantiate(config["assessment"]).check()
    assert str(record_path(config)).startswith("results/runs/kd/lt_kl/")
