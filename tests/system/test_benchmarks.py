"""Each benchmark at a size of seconds: to its printed report on the CPU, and on a pretended device, where no tensor may be left behind."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.pretended import DEVICE, Pretended, pretended
from trainers.runs.plan import tables

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import augmentation
import autoattack
import clip
import distillation
import gpu
import llava
import loss
import segmentation
import semi_supervised
import step
import table
import table5
import timing

pytestmark = pytest.mark.long  # every benchmark from its start to its report

__all__ = ["pretended"]  # a fixture
CPU = torch.device("cpu")
DKL = step.checkout(os.environ.get("DKL_REF"))
TINY = step.Setting(step.BASIC, "wrn_10_1", 8, "low", 1e9)  # a target that is missed, so that it is explained


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports go; and nothing of the process's arithmetic stays changed."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


def test_a_step_s_benchmark(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = step.rows_of(TINY, CPU, DKL, 1, compile=False)
    timing.report("step", "a heading", rows, CPU)
    assert "target ≥ 1e+09: MISSED" in capsys.readouterr().out
    kept = json.loads((results / "step-cpu.json").read_text())
    assert kept["rows"][0]["what"] == "wrn_10_1, K = 2, restatement / contiguous"
    assert any("profile" in row for row in kept["rows"])
    table.main()
    assert "| wrn_10_1, K = 2, " in (results / "README.md").read_text()


@pytest.mark.parametrize("experiment", [step.BASIC, step.AUTOAUG])
@pytest.mark.parametrize(
    "model", ["wrn_10_1", *(["wrn_16_2"] if DKL else [])]
)  # of a wrn_16_2 the authors' network, too
def test_a_step_is_the_others(experiment: str, model: str) -> None:
    """From a prior that is not uniform, so that gamma counts."""
    assert step.our_task(TINY, CPU).method.views.prior.probs.std(1).min() > 0.005
    found = step.equality(step.Setting(experiment, model, 4, "low", None), CPU, DKL, compile=False)
    assert set(found) == {"restatement", "ours"} | ({"authors'"} if DKL else set())
    for name in set(found) - {"ours"}:
        assert float(found[name].rsplit(" ", 1)[1]) < 1e-12, found


def test_a_step_s_tensors_are_on_the_device(pretended: Pretended) -> None:
    with pretended:
        found = step.equality(
            step.Setting(step.AUTOAUG, "wrn_10_1", 4, "low", None), DEVICE, DKL, compile=False
        )
    assert pretended.strays == []
    assert float(found["restatement"].rsplit(" ", 1)[1]) < 1e-12


def test_clip_s_benchmark(tmp_path: Path, results: Path) -> None:
    """Counted and timed; what a real network keeps of a pair takes half a minute, and stands in the committed file."""
    pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    rows = [clip.flops(tmp_path), *clip.timed(tmp_path, CPU, 1)]
    timing.report("clip", "a heading", rows, CPU)
    kept = json.loads((results / "clip-cpu.json").read_text())["rows"]
    assert kept[0]["met"] and 1.0 < kept[0]["ratio"][1] < 1.02
    assert [row["what"].split()[-1] for row in kept[1:]] == ["forward", "forward", "gkl"]


def test_a_distillation_step_is_the_published_one(tmp_path: Path) -> None:
    """With the teacher's logits kept; test_distillation.py has the live teacher."""
    pair = "resnet56_resnet20"
    plain = distillation.made("gkl", pair, CPU, timing.noise(), "precision=float64")
    exact = distillation.ways(CPU)["kept logits"].task(pair, CPU, str(tmp_path), "float64")
    assert (
        float(distillation.difference(distillation.Published(plain, pair), exact, 1).rsplit(" ", 1)[1])
        < 1e-12
    )


def test_the_loss_s_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ON_CPU", ((8, 10), (4, 6000)))
    monkeypatch.setattr(loss, "AT_MOST", {"cpu": (1e-9, 1e-9)})
    rows = loss.measured(CPU, 1, compiled=False)
    what = [row.what for row in rows]
    assert (
        "8 x 10, class-wise, fixed: ours / kl_div" in what
        and "4 x 6000, sample-wise, both: ours / kl_div" in what
    )
    assert any("operator calls" in row.more.get("profile", "") for row in rows)


def test_the_loss_s_tensors_are_on_the_device(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ON_CPU", ((8, 10),))
    monkeypatch.setattr(loss, "AT_MOST", {DEVICE.type: (1e9, 1e9)})
    with pretended:
        assert len(loss.measured(DEVICE, 1, compiled=False)) == 9
    assert pretended.strays == []


def test_a_semi_supervised_step_s_benchmark() -> None:
    rows = semi_supervised.measured("vit_small_patch4_32", CPU, 1)
    assert [row.at_most for row in rows] == [3.3, 2.567] and all(row.values[0] > 1 for row in rows)


def test_a_segmentation_step_s_benchmark() -> None:
    small = ("precision=float32", "model.name=pspnet_18_w8", "teacher.network.name=pspnet_18_w8")
    rows = segmentation.rows_of(CPU, 65, 1, *small)
    assert [row.at_most for row in rows] == [5.0, None, 4.5, None]
    memory = [row.values[0] for row in rows[2:]]
    assert 1.9 < memory[0] < memory[1]  # the gradient, and the gradient times what comes to it


def test_a_count_of_memory_counts() -> None:
    """Two tensors at once at most, of three that are made."""

    def call() -> None:
        for _ in range(2):
            one = torch.zeros(1000, 1000)
        del one

    found = segmentation.peak_tensors(call, 4_000_000)
    assert 1.9 < found < 2.1


def test_autoattack_s_benchmark(results: Path) -> None:
    whole = autoattack.enlarged()
    few = {"train_images": whole.train_images[:64], "train_labels": whole.train_labels[:64]}
    data = dataclasses.replace(whole, **few)
    model = autoattack.trained(data, "wrn_10_1", 1, CPU)
    assert autoattack.radius(model, data, CPU) in autoattack.RADII
    with autoattack.shortened(0.02):
        rows, different = autoattack.measured(model, data, 0.02, CPU, 1, 4)
    assert different == 0 and rows[0].equal.startswith("verdicts equal: 4 of 4")


def test_a_distillation_step_s_tensors_are_on_the_device(tmp_path: Path, pretended: Pretended) -> None:
    with pretended:
        exact = distillation.made(
            "gkl", "resnet56_resnet20", DEVICE, timing.noise(), "precision=float64", cache=str(tmp_path)
        )
        distillation.Published(exact, "resnet56_resnet20").step(0)
        exact.train_step(distillation.EPOCH, 0)
    assert pretended.strays == []


SMALL_MAPS = ("model.name=pspnet_18_w8", "teacher.network.name=pspnet_18_w8", "precision=float32")
SMALL_PAIRS = ("model.name=clip_64px_128", "teacher.network.name=clip_64px_128", "data.image_size=64", "data.context_length=32",
               "bn_groups=1", "batch_size=4", "precision=float32")  # fmt: skip


def test_the_others_steps_tensors_are_on_the_device(pretended: Pretended) -> None:
    """Few labels and a supervised step of these, maps, the divergence of maps."""
    with pretended:
        few = semi_supervised.made("mean_teacher_gkl", "vit_small_patch4_32", DEVICE)
        few.train_step(1, 0)
        semi_supervised.supervised(few)()
        segmentation.made(DEVICE, 33, *SMALL_MAPS).train_step(1, 0)
        segmentation.GKL()(*segmentation.logits(DEVICE, 9)).mean().backward()
    assert pretended.strays == []


def test_a_clip_step_s_tensors_are_on_the_device(pretended: Pretended) -> None:
    pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    with pretended:
        task = clip.on_noise("gkl", DEVICE, *SMALL_PAIRS)
        task.train_step(1, 0)
        clip.forward(task, task.batch(1, 0))
    assert pretended.strays == []


SMALL_TEXTS = ("model.tower.name=clip_scan_48", "model.tower.normalisation=null", "model.language.name=llama_scan", "model.rank=4",
               "data.image_size=8", "data.length=40", "precision=float32", "accumulate=2", "batch_size=4")  # fmt: skip
EXTRAS = {"clip": ("open_clip",), "llava": ("open_clip", "transformers", "peft")}  # what an experiment needs


def without_extra(experiment: str) -> None:
    """Skip where an extra is missing."""
    extra = experiment.partition("/")[0]
    for package in EXTRAS.get(extra, ()):
        pytest.importorskip(package, reason=f"needs {package}, the extra {extra}")


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # which is done all the same
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_llava_step_s_tensors_are_on_the_device(epoch: int, pretended: Pretended) -> None:
    without_extra("llava")
    with pretended:
        task = llava.on_noise("gkl", DEVICE, *SMALL_TEXTS)
        task.start_epoch(epoch)
        task.train_step(epoch, 0)
    assert pretended.strays == []


@pytest.mark.parametrize(("epoch", "learns"), [(1, {"projector"}), (2, {"projector", "language"})])
def test_a_llava_step_on_noise_is_its_phase_s(epoch: int, learns: set[str]) -> None:
    without_extra("llava")
    task = llava.on_noise("gkl", CPU, *SMALL_TEXTS, "schedule.warmup=0.0")
    task.start_epoch(epoch)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    first, second = (task.train_step(epoch, 0)["loss/answers"] for _ in range(2))
    moved = {name for name, p in task.model.named_parameters() if not p.equal(before[name])}
    assert second < first and {name.partition(".")[0] for name in moved} == learns
    assert all("projector" in name or "lora_" in name for name in moved)


def test_augmentation_s_benchmark(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["augmentation.py", "--rounds", "1", "--model", "wrn_10_1", "--batch", "8"]
    )
    augmentation.main()
    assert "crop_flip + autoaugment: percent of a step of wrn_10_1" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gkl", "crd"])
def test_table_5_s_tensors_are_on_the_device(method: str, pretended: Pretended) -> None:
    with pretended:
        table5.stepper(f"kd/in_{method}/resnet34_resnet18", DEVICE, 2, 64, "precision=float32")()
    assert pretended.strays == []


def test_intervals_are_counted_once() -> None:
    assert timing.covered([(0.0, 2.0), (1.0, 3.0), (1.5, 1.7), (5.0, 6.0)]) == 4.0
    assert timing.covered([]) == 0.0


def test_names_of_kernels_are_shortened() -> None:
    long = "void at::native::(anonymous namespace)::vectorized_kernel<4, at::native::Add<float>, std::array<char*, 3ul> >(int, Add)"
    assert timing.shortened(long) == "vectorized_kernel" and timing.shortened("aten::add_") == "add_"


def test_each_variant_has_its_own_arithmetic() -> None:
    before, seen = timing.arithmetic(), []
    other = timing.Arithmetic(True, False, False, True)
    timing.under(other, lambda: seen.append(timing.arithmetic()))()
    assert seen == [other] and timing.arithmetic() == before


SCRIPT = """
import os, sys
sys.path[:0] = {paths}
from timing import Row, spread
mark = sys.argv[0] + ".seen"
first = not os.path.exists(mark)
open(mark, "w").close()
spread(2, lambda: [Row("r", [0.9, 0.9, 9.0, 9.0, 0.9] if first else [9.0, 9.0, 0.9, 0.9, 0.9], at_most=1.0)])
"""


def test_rows_of_several_processes_are_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A target that the rounds miss together and no process alone has no profile to show."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT / "benchmarks"), str(ROOT)]))
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(timing.Row, "met", lambda self: False)
    (row,) = timing.spread(2, lambda: [])
    assert len(row.values) == 10 and "together" in row.more["profile"]


# --- make gpu ---------------------------------------------------------------------------------------------------------


def test_without_a_card_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("no GPU that torch ") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        (step.BASIC, ["model=wrn_10_1", "batch_size=8"]),
        ("kd/c100_gkl/resnet56_resnet20", ["batch_size=8"]),
        ("kd/in_vanilla/imagenet_resnet_18", ["batch_size=2"]),
        ("ssl/mean_teacher_gkl", ["model=vit_small_patch4_32", "batch_size=2"]),
        ("seg/apd_gkl", ["model.name=pspnet_18_w8", "teacher.network.name=pspnet_18_w8", "bn_groups=1", "batch_size=2"]),
        ("clip/gkl", ["model.name=clip_64px_128", "teacher.network.name=clip_64px_128", "data.image_size=64", "data.context_length=32",
                      "bn_groups=1", "batch_size=2"]),
        ("llava/gkl", [*SMALL_TEXTS]),
    ],
)  # fmt: skip
def test_a_step_of_each_kind_is_timed(
    experiment: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if experiment.startswith("kd/in"):
        monkeypatch.setitem(gpu.SIZES, "imagenet", gpu.Size(100, 10, 32, 1000))
    if experiment.startswith("seg/"):
        monkeypatch.setitem(gpu.SIZES, "ade20k", gpu.Size(20, 2, 33, 150))
    without_extra(experiment)
    monkeypatch.setitem(gpu.KINDS, "it", (experiment, tuple(overrides), 20))
    seen = gpu.measured("it", CPU, seconds=0.01)
    assert seen["tflops"] > 0 and seen["seconds"] > 0 and seen["batch"] == int(overrides[-1].split("=")[1])


def test_every_table_that_trains_has_its_hours_or_its_memory() -> None:
    """A table that comes later is put into one of them."""
    named = {
        number
        for key in (*gpu.HOURS, *gpu.LARGEST)
        for number in re.findall(r"\d+(?:kd)?", key.partition(":")[0].partition(", o")[0])
    }
    named |= {
        str(number)
        for first, last in re.findall(r"(\d+) to (\d+)", " ".join(gpu.LARGEST))
        for number in range(int(first), int(last))
    }
    assert {*tables()} <= named


def test_what_a_step_s_flops_are() -> None:
    config = gpu.compose("train", [f"experiment={step.BASIC}"])
    forward = gpu.forward_flops(config["model"], 32, 100)
    each = gpu.step_flops(config, 20) / forward / 128
    assert each == 2 * 5 + 1 + 6 + 6  # K = 5: attack, AWP, the step


def test_a_llava_step_s_flops_are_those_of_the_plan() -> None:
    """Of texts as long as those that are counted; a run has each text in one of its two phases, whose steps count alike."""
    without_extra("llava")
    name, own, epoch = gpu.KINDS["llava"]
    config = gpu.compose("train", [f"experiment={name}", *own])
    with torch.device("meta"):
        _, tokens, _ = gpu.instantiate(config["model"], num_classes=0).example_inputs()
    assert tokens.shape[1] == config["data"]["length"]
    size = gpu.size_of(config)
    each = gpu.forward_flops(config["model"], size.side, size.classes)
    assert {gpu.step_flops(config, phase) for phase in (1, epoch)} == {config["batch_size"] * 2 * each}
    assert gpu.needed_flops(config, size) == (2 * size.train + 2 * size.test) * each


def test_what_would_take_more_than_ten_minutes_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0.0, gpu.LAST - 1.0, gpu.LAST + 1.0])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(seconds))
    assert [*gpu.in_time({"a": 1, "b": 2, "c": 3}, 0.0)] == [("a", 1), ("b", 2)]
    assert capsys.readouterr().out == "c: left out, as 540 s are over (--only hours memory)\n"


def test_memory_at_the_paper_s_batch_follows_from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([3.0, 5.0])  # 1 + batch / 4
    monkeypatch.setattr(gpu, "stepper", lambda *asked: (lambda: None, {}))
    monkeypatch.setattr(gpu, "peak_gib", lambda *asked: next(peaks))
    monkeypatch.setitem(gpu.LARGEST, "it", (step.BASIC, (), (8, 16), 128))
    assert gpu.counted_peak("it", CPU) == 33.0


def test_the_last_line_says_whether_table_3_can_be_made() -> None:
    rate = gpu.Rate(100.0, "a card")
    assert gpu.verdict(None, 0.0, 80, 1).startswith("this machine cannot run make table3: ")
    assert ";" not in gpu.verdict(rate, 70.0, 80, 1)
    line = gpu.verdict(rate, 190.0, 80, 4)
    assert "this machine can run make table3: 36 runs, " in line and "need 4 such cards (DEVICES=4)" in line
