"""What a person can get wrong: one line saying what came and what to do, exit code 2, nothing half-written."""

import errno
import gc
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gkl.models import create
from tests.conftest import gpu_hidden
from trainers.command import run_main
from trainers.errors import ConfigError
from trainers.runs.__main__ import main as run_of
from trainers.runs.compose import choices, compose
from trainers.runs.launchers.local import Local
from trainers.runs.paths import freeze, run_folder
from trainers.runs.plan import ABSENT, tables
from trainers.runs.targets import check_values

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., tuple[int, str, str]]


def loaded(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gc.enable()  # which trainers.interrupt has ended until run_main, of a process of its own
    return module


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Call a script's main as the shell would: exit code, standard output, standard error."""
    monkeypatch.setenv("GKL_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("GKL_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("GKL_DATA", str(tmp_path / "data"))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        module = loaded(script)
        capfd.readouterr()
        code = run_main(module.main, module.__doc__)
        return code, *capfd.readouterr()

    yield call
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


GKL = "experiment=at/c100_basic_gkl"
CPU = ["device=cpu", "logger=off"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reproduce", r"name one table=\.\.\. of 1, 1kd, 2, 3, .* or one figure=\.\.\. of 1, 2, 3, 4"),
        ("reproduce table=3 figure=1", r"name one table=\.\.\. of 1, 1kd, 2, 3, .* or one figure=\.\.\. of 1, 2, 3, 4"),
        ("reproduce table=9", r"Table IX is the heading of Tables X to XII: make table10, table11 or table12"),
        ("reproduce table=33", r"unknown table '33'; did you mean '3'\?; there are: 1, 1kd, 2, 3, 4"),
        ("reproduce figure=5", r"unknown figure '5'.*there are: 1, 2, 3, 4"),
        ("reproduce table=3 tflops=fast", "tflops must be a number above 0, got 'fast'"),
        ("reproduce table=3 scale=smoek", r"unknown scale 'smoek'; did you mean 'smoke'\?"),
        ("reproduce table=3 protocol=mine", r"unknown protocol 'mine'; there are: official, paper"),
        ("reproduce table=3 rows=[gkl]", r"unknown row of table03 'gkl'; did you mean 'gkl_basic'\?; there are: awp, lbgat"),
        ("reproduce table=3 rows=gkl_basic", r"rows must be a list such as rows=\[.*got 'gkl_basic'"),
        ("reproduce table=3 seeds=[one]", r"seeds must be a list such as seeds=\[0,1\], got \['one'\]"),
        ("reproduce table=3 jobs=0", "jobs must be auto or a number above 0, got 0"),
        ("reproduce table=3 plan=maybe", "plan must be true or false, got 'maybe'"),
        ("reproduce table=3 scale=smoke epcohs=3", r"no setting 'epcohs' \(from 'epcohs=3'\); did you mean 'epochs'\?"),
        ("reproduce table=3 scale=smoke word", r"'word' is no setting; write name=value"),
        (f"train {GKL} loss.gamma=[0", r"cannot read 'loss\.gamma=\[0': a bracket is not closed"),
        (f"train {GKL} teacher.file=epoch=10.pt", r"quote a value with spaces, brackets or = in it: 'teacher\.file=\"epoch=10\.pt\"'"),
        (f"train {GKL} data=image_folder data.root='a", "a quote is not closed"),
        (f"train {GKL} logger.mode=of", r"logger\.mode must be online, offline or off, got 'of'"),
        (f"train {GKL} logger.patience=soon", r"logger\.patience must be a number, got 'soon'"),
        (f"train {GKL} +paths.resutls=a", r"unknown setting 'paths\.resutls'; did you mean 'paths\.results'\?"),
        (f"train {GKL} paths.results=null", r"paths\.results must be text, got null"),
        (f"train {GKL} paths.results=/proc/none {' '.join(CPU)} scale=smoke", r"cannot write in the results folder /proc/none: .*GKL_RESULTS"),
        (f"train {GKL} +momentun=0.9", "method/AdversarialTraining takes no momentun"),
        (f"train {GKL} +averages.swa2=1", r"averages\.swa2 must be an average of configs/averages, got 1"),
        (f"train {GKL} evaluation=null", r"evaluation=\.\.\. needs a choice; one of: autoattack, imagenet, screen"),
        (f"train {GKL} paths=null", r"the configuration lacks paths; leave out .*paths=null"),
        ("sweep loss.gamma=0,1", r"a sweep needs one experiment=\.\.\.; one of: at/c100_acat"),
        (f"sweep {GKL}", r"nothing to sweep: give a setting several values, as in loss\.gamma=0,0\.2,0\.4"),
        (f"sweep {GKL} loss=kl,gkl", r"a sweep goes over settings such as loss\.gamma, got 'loss=kl,gkl'"),
        (f"sweep {GKL} scale=smoke loss.gama=0,1", r"loss\.gama.*did you mean 'gamma'\?"),
        ("evaluate published=Cui", r"unknown published checkpoint 'Cui'; there are: Addepalli2022"),
        (f"train {GKL} scale=smoke assessment=pgd", r"unknown assessment 'pgd'"),
        ("reproduce table=3 scale=smoke plan=true evaluation.images=abc", "evaluation.images must be a whole number, robustbench or null"),
        ("reproduce table=3 scale=smoke plan=true seeds=[-1]", r"seed must be in \[0, 262144\], got -1"),
        ("prepare generated=x", r"parts must be a list such as parts=\[part1\.npz,part2\.npz\], got \[\]"),
        ("prepare generated=x parts=[nowhere.npz]", r"no part of generated pictures at nowhere\.npz"),
        ("train", r"experiment=\.\.\. is missing; one of: at/c100_acat"),
        ("train experiment=at/c100_basic_gk", r"unknown experiment 'at/c100_basic_gk'; did you mean 'at/c100_basic_gkl'\?"),
        (f"train {GKL} scale=tiny", "unknown scale 'tiny'"),
        (f"train {GKL} scale=5", r"scale=... needs a choice; one of: paper, small, smoke"),
        (f"train {GKL} scale=smoke los.gamma=0.3", r"no setting '?los"),
        (f"train {GKL} scale=smoke loss.gama=0.3", r"loss\.gama.*did you mean 'gamma'\?"),
        (f"train {GKL} scale=smoke +loss.gama=0.3", r"loss/GKL takes no loss\.gama; did you mean 'gamma'\?"),
        (f"train {GKL} scale=smoke epochs=many", r"epochs must be a whole number, got 'many'"),
        (f"train {GKL} scale=smoke loss.gamma=high", r"loss\.gamma must be a number, got 'high'"),
        (f"train {GKL} scale=smoke precision=fp8", r"precision must be float32, tf32, bf16, fp16 or float64, got 'fp8'"),
        (f"train {GKL} scale=smoke epochs=0", "epochs must be at least 1, got 0"),
        (f"train {GKL} scale=smoke seed=0,1", "names several values; one run takes one value each"),
        (f"train {GKL} scale=smoke devices=3", r"batch_size=128 cannot be shared by 3 processes; choose devices= a divisor"),
        (f"train {GKL} scale=smoke batch_size=96 devices=6", r"bn_groups=4 must be a multiple or a divisor of devices=6"),
        (f"train {GKL} scale=smoke evaluate=best", r"unknown evaluate 'best';.* there are: last, swa, ema"),
        (f"train {GKL} scale=smoke model._target_=os.system", r"a configuration builds only what a file of configs/ names"),
        (f"train {GKL} scale=smoke model._target_=gkl.models.creat", r"'gkl\.models\.creat'; a configuration builds only what a file of configs/ names"),
        ("evaluate model=wrn_10_1 data=digits", r"checkpoint=\.\.\. is missing|checkpoint"),
        ("evaluate checkpoint=nowhere.pt model=wrn_10_1 data=digits", r"no checkpoint at nowhere\.pt; set checkpoint="),
        ("evaluate checkpoint=nowhere.pt model=wrn data=digits", "unknown model 'wrn'"),
    ],
)  # fmt: skip
def test_one_line_and_exit_code_2(command: Command, arguments: str, message: str, tmp_path: Path) -> None:
    script, *rest = arguments.split()
    code, out, err = command(script, *rest)
    assert code == 2, (out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(message, lines[0]), lines[0]
    assert written(tmp_path) == []


@pytest.mark.parametrize("arguments", [f"train {GKL}", "reproduce table=3"])
def test_no_gpu(command: Command, arguments: str, tmp_path: Path) -> None:
    script, *rest = arguments.split()
    code, out, err = command(script, *rest)
    assert code == 2 and "scale=paper needs a GPU and torch sees none; try scale=smoke" in err
    assert err.count("\n") == 1 and written(tmp_path) == []
    if script == "reproduce":
        assert (
            "about" in out and "device-hours" in out and "0 of 36 runs done" in out
        )  # what it would cost comes first


def run_main_of_a_run(path: Path) -> int:
    """trainers.runs as its process would end."""
    before, sys.argv = sys.argv, ["trainers.runs", str(path)]
    try:
        return run_main(run_of)
    finally:
        sys.argv = before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=image_folder", "data.root=nowhere"],
            "no picture folder or zip archive at nowhere; set data.root=",
        ),
        (["data=cifar100", "data.download=false"], r"no CIFAR100 in .*; put cifar-100-python.tar.gz"),
        (["loss.gamma=2"], r"loss\.gamma must lie in \[0, 1\], got 2"),
        (
            ["augment.views=[cutout]"],
            r"augment\.views must name some of crop_flip, crop_flip_rotate, autoaugment",
        ),
        (["method.view_weights=[1.0,0.5]"], "needs one weight per view"),
        (["model.name=wrn_34_11"], "no network is called 'wrn_34_11'; the closest names are"),
        (["attack.norm=l1"], r"attack\.norm must be.*'l1'"),
        (["graph=true"], "graph=true records a GPU's work, and this run is on cpu; use graph=auto"),
        (["device=cuda"], "device=cuda needs a GPU that torch can see, there is none"),
    ],
)
def test_what_only_the_run_can_know(
    command: Command, overrides: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = freeze(compose("train", [GKL, "scale=smoke", *CPU, *overrides]))
    code = run_main_of_a_run(path)
    err = capfd.readouterr().err
    assert code == 2 and re.search(message, err) and err.count("\n") == 1, err
    assert {p.name for p in written(tmp_path)} <= {path.name}


def test_damaged_pictures_and_outputs_that_cannot_be_written(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures.zip").write_bytes(b"PK\x03\x04 cut short")
    config = compose(
        "train", [GKL, "scale=smoke", *CPU, "data=image_folder", f"data.root={tmp_path}/pictures.zip"]
    )
    assert run_main_of_a_run(freeze(config)) == 2
    assert "neither a folder nor a zip archive" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GKL_OUTPUTS", str(tmp_path / "file"))
    code, _, err = command("train", GKL, "scale=smoke", *CPU)
    assert code == 2 and "cannot write in the output folder" in err and "GKL_OUTPUTS" in err
    assert err.count("\n") == 1


def test_every_table_and_figure_of_the_paper_is_there_or_says_why_not() -> None:
    """Tables I to XXIV and figures 1 to 4."""
    for kind, numbers in (("table", range(1, 25)), ("figure", range(1, 5))):
        named = {str(number) for number in numbers}
        built = {number for number in tables(kind) if number != "1kd"}
        assert built | ABSENT[kind].keys() == named and not built & ABSENT[kind].keys()


def test_a_damaged_record_holds_up_no_table_and_no_report(command: Command, tmp_path: Path) -> None:
    kept = next((ROOT / "results/runs/at/c100_basic_gkl/smoke").glob("*/seed0.json"))
    runs = tmp_path / "results/runs/at/c100_basic_gkl/smoke"
    shutil.copytree(kept.parent, runs / kept.parent.name)
    harmed = runs / kept.parent.name / "seed0.json"
    shutil.copy(harmed, harmed.with_name("seed9.json"))  # another seed's name on this one's content
    harmed.write_text("")
    told = f"error: record {harmed} is damaged"
    code, out, err = command("reproduce", "table=3", "scale=smoke", "rows=[gkl_basic]", "plan=true")
    assert code == 2 and told in err and "missing: seed 0" in out, (out, err)
    code, out, err = command("report", "page")
    assert code == 2 and told in err and "wrote" in out, (out, err)


def test_checkpoints_that_do_not_fit(command: Command, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(create("wrn_10_1", num_classes=7).state_dict(), tmp_path / "other.pt")
    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "bomb.pt")
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:1000])
    for name, message in (
        ("other", "fc|classes|shape"),
        ("bomb", "could run code"),
        ("damaged", "is damaged or no checkpoint"),
    ):
        code, _, err = command(
            "evaluate", f"checkpoint={tmp_path}/{name}.pt", "model=wrn_10_1", "data=digits", "device=cpu"
        )
        assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "outputs").exists()


def test_any_checkpoint_is_evaluated(command: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create("wrn_10_1", num_classes=10)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}  # as DataParallel saves
    torch.save({"state_dict": state}, tmp_path / "theirs.pt")
    arguments = [
        f"checkpoint={tmp_path}/theirs.pt", "model=wrn_10_1", "data=digits", "device=cpu", "evaluation=screen",
        "evaluation.images=10", "evaluation.epsilon=0.05",
    ]  # fmt: skip
    code, out, err = command("evaluate", *arguments)
    assert code == 0, err
    assert (
        '"screen"' in out
        and '"clean"' in out
        and '"n": 10' in out
        and "46 of the model's 46 tensors matched" in err
    )
    again = command("evaluate", *arguments)
    assert again[1] == out and ", batch 1 of 1" in err and ", batch" not in again[2], (
        "finished batches are kept"
    )
    assert "AutoAttack" not in out + err and '"aa"' not in out, "the screen is called a screen"


def test_a_failing_row_is_named_and_the_others_are_stopped(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "reproduce", "table=3", "scale=smoke", "rows=[gkl_basic,kl_basic]", "data=image_folder", "data.root=nowhere",
        "logger=off", "jobs=2",
    )  # fmt: skip
    assert code == 2 and "Traceback" not in err
    assert re.search(r"row (gkl|kl)_basic, seed 0 failed: .*no picture folder or zip archive at nowhere", err)
    assert "whole log:" in err and "0 of 2 runs done" in out and not (tmp_path / "results").exists()


def test_plan_help_and_printed_configuration(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("reproduce", "table=4", "scale=smoke", "plan=true")
    assert code == 0 and "0 of 12 runs done" in out
    code, out, _ = command("train", GKL, "scale=smoke", "--cfg")
    assert code == 0 and "gamma: 0.4" in out and "paths:" in out
    for script in ("train", "reproduce", "evaluate", "doctor"):
        code, out, _ = command(script, "--help")
        assert code == 0 and f"scripts/{script}.py" in out
    assert written(tmp_path) == [] and Local().concurrent_runs(10**6) == 1


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EIO, 2), (errno.EMFILE, 2), (errno.ENOENT, None)],
)
def test_a_disk_that_fails_is_one_line_and_a_bug_is_not(
    number: int, code: int | None, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise OSError(number, os.strerror(number), "history.jsonl")

    if code is None:
        with pytest.raises(OSError):
            run_main(fail)
        return
    assert run_main(fail) == code
    assert (
        f"error: {os.strerror(number)} at history.jsonl; what was finished is kept" in capfd.readouterr().err
    )


def test_a_test_that_asks_for_no_gpu_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a process that it starts; the marker gpu asks for one."""
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    program = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "''\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with gpu_hidden():
        assert not torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_doctor(command: Command) -> None:
    code, out, err = command("doctor")
    assert code == 0, out + err
    for words in (
        "python 3.1",
        "ok  torch ",
        "outputs: ",
        "data digits: 1437 train",
        "data cifar100: no CIFAR100",
        "table 3: ",
    ):
        assert words in out, words


@pytest.mark.skipif(not shutil.which("make"), reason="needs make on the PATH")
def test_make_help_names_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and all(f"make {target}" in done.stdout for target in phony[1].split())
    dry = subprocess.run(
        ["make", "-n", "table3", "SCALE=smoke", "SEEDS=0,1", "ROWS=kl_basic,gkl_basic", "PLAN=1", "ARGS=epochs=3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.replace("\\\n", " ")  # fmt: skip
    for words in (
        "table=3",
        "scale=smoke",
        "'seeds=[0,1]'",
        "'rows=[kl_basic,gkl_basic]'",
        "plan=true",
        "epochs=3",
    ):
        assert words in dry
    named = subprocess.run(
        ["make", "-n", "eval", "CKPT=epoch=3-acc (1), best.ckpt", "MODEL=resnet18"], cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert """'checkpoint="epoch=3-acc (1), best.ckpt"' model=resnet18""" in named


def test_every_published_checkpoint_is_named_with_its_network_data_and_numbers(
    command: Command, tmp_path: Path
) -> None:
    evaluate = loaded("evaluate")
    for name in choices("published"):
        arguments, published = evaluate.with_published([f"published={name}"])
        config = compose("evaluate", arguments)
        check_values(config)
        assert config["data"]["_target_"] == f"data/{name.rpartition('_')[2]}"
        assert 0 < published["aa"] < published["clean"] < 100 and published["url"].startswith("https://")
        assert config["checkpoint"].endswith(f"checkpoints/{name}.pt")
        mine, _ = evaluate.with_published([f"published={name}", "checkpoint=mine.pt", "data=digits"])
        assert compose("evaluate", mine)["checkpoint"] == "mine.pt"
    there = tmp_path / "there.bin"
    there.write_bytes(b"PK weights")
    evaluate.fetch(there.as_uri(), tmp_path / "new" / "a.pt")
    assert (tmp_path / "new" / "a.pt").read_bytes() == b"PK weights"
    there.write_bytes(b"<html>quota exceeded")
    for url, reason in ((there.as_uri(), "a web page"), ((tmp_path / "no").as_uri(), "No such file")):
        with pytest.raises(ConfigError, match=f"{reason}.*download it by hand and pass checkpoint=FILE"):
            evaluate.fetch(url, tmp_path / "new" / "b.pt")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_a_sweep_plans_every_combination(command: Command) -> None:
    code, out, _ = command("sweep", GKL, "scale=smoke", "loss.gamma=0,0.2", "loss.alpha=12,20", "plan=true")
    assert code == 0 and "0 of 4 runs done" in out and "loss.gamma=0.2,loss.alpha=12" in out


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_ctrl_c_while_a_script_is_read_prints_no_traceback(script: str) -> None:
    """It is sent when the first module of ours has been imported, and torch has not."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", f"scripts/{script}.py", "--help"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "trainers.interrupt" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and not out
    assert "Traceback" not in err and "KeyboardInterrupt" not in err


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Greek letters stand in configs and records."""
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "experiment=at/c100_basic_gkl", "scale=smoke", "--cfg"], cwd=ROOT, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr and b"gamma" in done.stdout


def test_a_folder_in_a_file_s_place_does_not_stop_a_start(tmp_path: Path) -> None:
    config = compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", f"paths.outputs={tmp_path}"])
    place = run_folder(config).path / "progress.json"
    place.mkdir(parents=True)
    freeze(config)
    assert not place.exists()
