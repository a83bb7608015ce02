"""LLaVA: two whole steps of either phase against a straight line in float64; micro-batches, resumed, two processes; recipe; what it costs."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
pytest.importorskip("transformers", reason="needs transformers, the extra llava")
pytest.importorskip("peft", reason="needs peft, the extra llava")

from gkl.data.augment import to_float
from gkl.data.conversations import IGNORED, IMAGE
from gkl.data.dialogues import DialogueBatch
from gkl.data.digit_questions import digit_texts
from gkl.distributed import all_reduce, rank
from gkl.evaluation.vqa_files import read_answers
from gkl.models.clip import clip
from gkl.models.language import llama
from gkl.optim.schedules import warmup_share_cosine
from tests.processes import on_processes
from tests.system.test_ranks import assert_equal
from tests.tape import Taped
from trainers.errors import ConfigError
from trainers.loop.console import Console
from trainers.loop.training import Training
from trainers.methods.llava import Llava
from trainers.runs.compose import compose
from trainers.runs.cost import SIZES as DATA_SIZES
from trainers.runs.cost import forward_flops, needed_flops
from trainers.runs.plan import cells, load_table
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate
from trainers.runs.teacher import prerequisites

SIZES = (
    "data.caption_epochs=1",
    "data.epochs=2",
    "data.caption_batch_size=48",
    "batch_size=32",
    "data.cards=4",
    "method.projector_lr=0.001",
    "optimizer.lr=0.003",
    "optimizer.projector_lr=0.001",
)


@dataclass
class Drawn:
    """A tower or a language model whose weights are drawn."""

    what: str
    cache: None = None

    def load(self, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            made = (
                llama("llama_scan") if self.what == "language" else clip("clip_scan_48", normalisation=None)
            )
        return made, {"run": self.what, "sha256": "none"}


def make_task(folder: Path, *own: str, precision: str = "float64", device: str = "cpu") -> Training:
    words = [
        "experiment=llava/gkl", "scale=smoke", f"precision={precision}", "channels_last=false", "device=cpu", "workers=0",
        f"data.root={folder}/questions", *SIZES, *own,
    ]  # fmt: skip
    config = compose("train", words)
    check(config, 1)
    torch.manual_seed(0)
    given = {"tower": Drawn("tower"), "language_model": Drawn("language")}
    return build(config, device=torch.device(device), data=instantiate(config["data"]), **given)


def language_task(folder: Path, *own: str, device: str = "cpu") -> Training:
    """Of a language model alone."""
    words = [
        "experiment=llava/language", "scale=smoke", "precision=float64", "channels_last=false", "device=cpu", "workers=0",
        f"data.root={folder}/questions", "data.told_epochs=1", "data.epochs=1", *own,
    ]  # fmt: skip
    config = compose("train", words)
    check(config, 1)
    torch.manual_seed(0)
    return build(config, device=torch.device(device), data=instantiate(config["data"]))


def trained(task: Training, epoch: int, steps: int = 2) -> dict[str, Any]:
    task.start_epoch(epoch)
    shares = [task.train_step(epoch, step) for step in range(steps)]
    logged = [{name: all_reduce(value) for name, value in row.items()} for row in shares]
    return copy.deepcopy({"logged": logged, **task.state_dict()})


def nll(network: Any, batch: DialogueBatch, row: int) -> Tensor:
    """-log p of a text's answer tokens, one text at a time, without padding, the picture by hand."""
    length = int(batch.there[row].sum())
    tokens, labels = batch.tokens[row, :length], batch.labels[row, :length]
    embedded = network.language.model.get_input_embeddings()(tokens.masked_fill(tokens == IMAGE, 0))
    if batch.shown[row]:
        x = to_float(batch.images[int(batch.shown[:row].sum())][None]).double()
        seen = network.projector(patches(network.tower, x))[0]
        embedded = torch.cat(
            [
                embedded[: (tokens == IMAGE).nonzero()[0]],
                seen,
                embedded[(tokens == IMAGE).nonzero()[-1] + 1 :],
            ]
        )
    logits = network.language.model(inputs_embeds=embedded[None]).logits[0]
    answers = labels[1:] != IGNORED
    return F.cross_entropy(logits[:-1][answers], labels[1:][answers], reduction="none")


def patches(tower: Any, x: Tensor) -> Tensor:
    """What goes into the last block of OpenCLIP's tower, without the class token."""
    seen: list[Tensor] = []
    handle = tower.model.visual.transformer.resblocks[-1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        tower.model.encode_image(x)
    handle.remove()
    return seen[0][:, 1:]


@pytest.mark.parametrize("epoch", [1, 2])
def test_two_steps_are_a_straight_line_s(epoch: int, tmp_path: Path) -> None:
    """A card's loss is its mean over answer tokens, a step's the mean over cards; each phase has an AdamW of its own."""
    task = make_task(tmp_path, "model.dropout=0.0")
    task.start_epoch(epoch)
    network = copy.deepcopy(task.model)
    for p in network.parameters():
        p.requires_grad_(False)
    learned = {
        n: p for n, p in network.named_parameters() if "projector" in n or (epoch > 1 and "lora_" in n)
    }
    for p in learned.values():
        p.requires_grad_(True)
    groups = [
        {"params": [p for n, p in learned.items() if "projector" in n], "base": 1e-3},
        {"params": [p for n, p in learned.items() if "lora_" in n], "base": 3e-3},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    steps = task.steps_in(epoch) * (1 if epoch == 1 else 2)
    for step in range(2):
        batch = task.batch(epoch, step)
        rising = math.ceil(0.03 * steps)
        rate = (
            step / rising
            if step < rising
            else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        )
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        size = len(batch.tokens) // 4
        cards = [
            torch.cat([nll(network, batch, row) for row in range(n * size, (n + 1) * size)]) for n in range(4)
        ]
        loss = torch.stack([card.mean() for card in cards]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logged = task.train_step(epoch, step)
        torch.testing.assert_close(logged["loss/answers"], loss.detach(), rtol=1e-10, atol=0)
    now = dict(task.model.named_parameters())
    for name, p in network.named_parameters():
        torch.testing.assert_close(now[name], p, rtol=1e-9, atol=1e-11, msg=name)
    assert epoch == 1 or any("lora_B" in n and now[n].abs().sum() > 0 for n in now)


def test_the_second_phase_forgets_the_first_one_s_averages(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    trained(task, 1)
    assert len(task.optimizer.state) == 4  # the projector alone has learned
    task.start_epoch(2)
    assert not task.optimizer.state and task.base_lrs == [1e-3, 3e-3]
    trained(task, 2, 1)
    assert len(task.optimizer.state) == 4 + len(task.model.adapters())
    task.start_epoch(3)
    assert task.optimizer.state and task.method.span(3) == (2, 3) and task.method.span(1) == (1, 1)
    assert (task.steps_in(1), task.steps_in(2)) == (math.ceil(1437 / 48), math.ceil(1437 / 32))


@pytest.mark.parametrize("epoch", [1, 2])
def test_micro_batches_are_exact(epoch: int, tmp_path: Path) -> None:
    whole, parts = (make_task(tmp_path, f"accumulate={n}") for n in (1, 4))
    sizes: list[int] = []
    parts.model.tower.model.visual.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    parts.model.language.model.model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    assert_equal(trained(whole, epoch), trained(parts, epoch), str(epoch), rtol=1e-9, atol=1e-11)
    assert {*sizes} == {12 if epoch == 1 else 8}


def test_a_run_goes_on_to_the_same_bits_in_either_phase(tmp_path: Path) -> None:
    whole = make_task(tmp_path, precision="float32")
    for epoch in (1, 2):
        whole.start_epoch(epoch)
        for step in range(3):
            if step == 1:
                torch.save(whole.state_dict(), tmp_path / "kept.pt")
            whole.train_step(epoch, step)
        other = make_task(tmp_path, precision="float32")
        other.load_state_dict(torch.load(tmp_path / "kept.pt", weights_only=True))
        other.start_epoch(epoch)
        for step in (1, 2):
            other.train_step(epoch, step)
        for name, value in whole.model.state_dict().items():
            assert other.model.state_dict()[name].equal(value), (epoch, name)
    with pytest.raises(ConfigError, match="another teacher"):
        whole.load_state_dict(
            {**whole.state_dict(), "teacher": {"tower": {"run": "other", "sha256": "none"}}}
        )


def test_what_is_frozen_is_in_no_checkpoint(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    frozen = {
        n: p.clone() for n, p in task.model.named_parameters() if "lora_" not in n and "projector" not in n
    }
    trained(task, 1)
    state = trained(task, 2)
    assert all("projector" in key or "lora_" in key for key in state["model"])
    assert all(p.equal(frozen[n]) for n, p in task.model.named_parameters() if n in frozen)
    held = sum(v.numel() for v in state["model"].values())
    torch.save(state, tmp_path / "state.pt")
    assert (
        tmp_path / "state.pt"
    ).stat().st_size < 8 * held * 3 + 100_000  # the weights and Adam's two averages
    assert held < 0.25 * sum(p.numel() for p in task.model.parameters())


def worker(folder: str) -> None:
    for epoch in (1, 2):
        found = trained(make_task(Path(folder)), epoch)
        if rank() == 0:
            torch.save(found, f"{folder}/{epoch}.pt")
    task = make_task(Path(folder))
    answers = task.method.answers("gqa")
    if rank() == 0:
        Path(folder, "answers.json").write_text(json.dumps(answers))


@pytest.mark.parametrize("made", [make_task, language_task])
def test_steps_say_why_they_are_not_recorded(made: Any, tmp_path: Path) -> None:
    task, told = made(tmp_path), list[str]()
    task.say, task.replayed = told.append, Taped(warn=pytest.fail)
    trained(task, 1)
    (line,) = told
    assert "not recorded" in line and "answer tokens are picked by a mask" in line and task.replayed is None
    assert ("each phase" in line) == (made is make_task)


@pytest.mark.long  # two processes that import transformers
def test_two_processes_equal_one(tmp_path: Path) -> None:
    alone = {epoch: trained(make_task(tmp_path), epoch) for epoch in (1, 2)}
    answers = make_task(tmp_path).method.answers("gqa")
    on_processes(worker, tmp_path, str(tmp_path))
    for epoch, one in alone.items():
        shared = torch.load(tmp_path / f"{epoch}.pt", weights_only=True)
        assert_equal(one, shared, str(epoch), rtol=1e-9, atol=1e-11)
    assert json.loads((tmp_path / "answers.json").read_text()) == answers


def test_answers_are_measured_and_written_as_their_benchmarks_take_them(tmp_path: Path) -> None:
    task = make_task(tmp_path, "method.longest_answer=2", precision="float32")
    console = Console("", enabled=False, folder=tmp_path)
    metrics, details = task.method.evaluate(headline="last", settings={}, folder=tmp_path, console=console)
    assert {"textvqa", "mmbench", "mmbench_cn", "gqa_open", "gqa_accuracy", "pope_random"} <= metrics.keys()
    assert all(0 <= value <= 100 for value in metrics.values())
    assert details["questions"] == {
        "textvqa": 360,
        "mmbench": 480,
        "mmbench_cn": 480,
        "gqa": 360,
        "pope": 720,
    }
    written = {path.name for path in (tmp_path / "answers").iterdir()}
    assert written == {"textvqa.json", "gqa.json", "pope.jsonl", "mmbench.xlsx", "mmbench_cn.xlsx"}
    pope = task.data.asked["pope"].benchmark
    again = read_answers(tmp_path / "answers/pope.jsonl", pope.questions)
    assert pope.score(again) == {k: v for k, v in metrics.items() if k.startswith("pope")}
    assert len(details["shown"]) == 10 and details["shown"][0].keys() == {
        "benchmark",
        "question",
        "answer",
        "picture",
    }
    json.dumps(details)


def test_the_recipe() -> None:
    config = compose("train", ["experiment=llava/baseline"])
    check(config, 8)
    data, model = config["data"], config["model"]
    assert (data["caption_epochs"], data["caption_batch_size"], data["epochs"], config["batch_size"]) == (
        1,
        256,
        1,
        128,
    )
    assert (config["epochs"], data["length"], data["cards"], config["precision"]) == (2, 2048, 8, "bf16")
    assert (model["rank"], model["alpha"], model["dropout"]) == (128, 256, 0.05)
    assert (model["tower"]["name"], model["language"]["name"]) == ("ViT-B-16", "vicuna-7b")
    assert model["language"]["dtype"] == "bfloat16" and config["schedule"]["warmup"] == 0.03
    rates = (config["method"]["projector_lr"], config["optimizer"]["lr"], config["optimizer"]["projector_lr"])
    assert rates == (1e-3, 2e-4, 2e-5) and "weight_decay" not in config["optimizer"]
    assert (data["image_size"] // data["patch_size"]) ** 2 == 196
    assert config.get("language_model") is None and {*prerequisites(config)} == {"tower"}


def test_the_schedule_is_transformers_own() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * 250), 250)
    for step in range(250):
        assert theirs.get_last_lr()[0] == pytest.approx(
            warmup_share_cosine(step, 250, warmup=0.03), abs=1e-12
        )
        optimizer.step()
        theirs.step()


def test_students_are_prerequisites_of_any_depth() -> None:
    """The CLIP teacher, then the student, then LLaVA; each once."""
    plan = cells(load_table("8"), scale="smoke", protocol="official", seeds=[0])
    order = [cell.config["experiment"] for cell in plan]
    assert sorted(order) == [
        "clip/baseline", "clip/gkl", "clip/kl", "clip/teacher", "llava/baseline", "llava/gkl", "llava/kl", "llava/language",
    ]  # fmt: skip
    assert order.index("clip/teacher") < min(order.index(f"clip/{row}") for row in ("kl", "gkl"))
    assert max(order.index(f"clip/{row}") for row in ("baseline", "kl", "gkl")) < order.index(
        "llava/baseline"
    )
    (kl,) = (cell for cell in plan if cell.config["experiment"] == "clip/kl")
    rows = {row["id"]: row for row in load_table("7")["rows"]}
    (seven,) = (
        c
        for c in cells(load_table("7"), scale="smoke", protocol="official", seeds=[0], rows=["kl_8"])
        if c.row == "kl_8"
    )
    assert kl.record == seven.record and rows["kl_8"]["overrides"] == {"loss.temperature": 8.0}


def test_a_person_s_own_data_is_not_its_tower_s() -> None:
    config = compose(
        "train", ["experiment=llava/gkl", "scale=smoke", "data.epochs=3", "batch_size=32", "device=cpu"]
    )
    made = prerequisites(config)
    usual = compose("train", ["experiment=clip/gkl", "scale=smoke"])
    assert made["tower"] == {**usual, "device": "cpu", "overrides": ["device=cpu"]}
    assert made["language_model"]["data"]["_target_"] == "data/digit_texts"


def test_the_plan_counts_what_a_step_takes(tmp_path: Path) -> None:
    config = compose("train", ["experiment=llava/gkl"])
    assert Llava.forwards(config, 1, 0) == {"model": 2.0}
    flops = forward_flops(config["model"], 224, 0)
    passes = 2 * (558_128 + 665_298) + 2 * 35_500  # each text in one epoch, the questions after each
    assert needed_flops(config, DATA_SIZES["llava_data"]) == passes * flops
    assert 0.9 < flops / (2 * 6.6e9 * (196 + 256) + 2 * 86e6 * 197) < 1.2  # two for each weight and token


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("epochs=5",), "epochs=5, and the phases of digit_questions have 3; set data.epochs"),
        (("drop_last=true",), "set drop_last=false"),
        (("augment=basic",), "needs augment=padded_square"),
        (("held_out=0.1",), "none held out"),
        (("data.length=300",), "llama_scan reads 256 tokens at most, got data.length=300"),
        (
            ("data.patch_size=4",),
            "makes 16 tokens of 8 pixels, got data for 4 of 8; set data.image_size and data.patch_size",
        ),
    ],
)
def test_what_does_not_fit_is_a_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make_task(tmp_path, *words)


def test_other_data_and_networks_are_refused(tmp_path: Path) -> None:
    config = compose(
        "train", ["experiment=llava/gkl", "scale=smoke", f"data.root={tmp_path}/questions", *SIZES]
    )
    given = {"tower": Drawn("tower"), "language_model": Drawn("language"), "device": torch.device("cpu")}
    texts = digit_texts(f"{tmp_path}/questions", told_epochs=1, epochs=2)
    with pytest.raises(ValueError, match="makes 16 tokens of 8 pixels, got data for 0 of 1"):
        build(config, data=texts, **given)
    data = instantiate(config["data"])
    with pytest.raises(ValueError, match="LLaVA needs its own network, got Clip; model=llava"):
        build(config, data=data, model=clip("clip_scan_48", normalisation=None), **given)
    other = compose(
        "train", ["experiment=llava/language", "scale=smoke", "data.told_epochs=1", "data.epochs=2"]
    )
    with pytest.raises(ValueError, match="texts are read by a language model, got Clip; model=llama"):
        build(other, data=texts, model=clip("clip_scan_48", normalisation=None), device=torch.device("cpu"))
