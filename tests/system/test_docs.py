"""What README and docs show: their code runs, their commands exist, their diffs apply and do what the page says, the site builds.

Marks in a page: a Python block titled `needs ...` runs where that is there; one titled `name.py` is that file, run by the page's commands;
the other Python blocks of a page continue one another. A page with a diff runs its commands in a copy of the repository with it applied.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.system.test_commands import loaded
from trainers.runs.compose import compose
from trainers.runs.paths import processes
from trainers.runs.plan import cells, experiments, load_table, tables
from trainers.runs.reproduce import read_settings
from trainers.runs.settings import check
from trainers.runs.sweep import planned, read_sweep
from trainers.runs.targets import check_values

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS: dict[str, Callable[[], object]] = {
    "a C++ compiler": lambda: shutil.which("c++") or shutil.which("g++"),
}
ROMAN = "I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX XXI XXII XXIII XXIV".split()
FOLDERS = (
    "benchmarks",
    "configs",
    "docs",
    "gkl",
    "results",
    "scripts",
    "tests",
    "trainers",
    ".ci",
    ".github",
)
SLOW = ("adding-a-method", "adding-a-data-set")  # whose commands train for minutes


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(
        r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert 2 * len(found) == len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)), (
        "a fence is not understood"
    )
    return [block for block in map(Block._make, found) if block.language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of each line that a page shows to be typed."""
    text = "".join(block.text for block in blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def pages_with(*languages: str) -> list[Any]:
    return [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, *languages)]


def ran(words: Sequence[str], folder: Path, **environment: str) -> str:
    """What a command prints; it must end well."""
    there = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(words, cwd=folder, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


# --- code -------------------------------------------------------------------------------------------------------------


def starts(page: Path) -> list[list[str]]:
    """The commands that start files of the page on several processes; those of a page with a diff are run where that is applied."""
    shown = [] if blocks(page, "diff") else commands(page)
    return [words for words in shown if words[0] == "torchrun" and words[-1].endswith(".py")]


def pages_in_full() -> list[Any]:
    """Pages with blocks that compile, or that several processes run."""
    return [
        pytest.param(page, True, id=f"{name(page)}, in full", marks=pytest.mark.long)
        for page in PAGES
        if any(block.title.startswith("needs ") for block in blocks(page, "python")) or starts(page)
    ]


@pytest.mark.parametrize(
    ("page", "full"),
    [*(pytest.param(*p.values, False, id=p.id) for p in pages_with("python")), *pages_in_full()],
)
def test_code_runs_as_printed(page: Path, full: bool, tmp_path: Path) -> None:
    program = []
    for block in blocks(page, "python"):
        if block.title.endswith(".py"):
            (tmp_path / block.title).write_text(block.text)
        elif not block.title or (full and NEEDS[block.title.removeprefix("needs ")]()):
            program.append(block.text)
    if program:
        ran([sys.executable, "-c", "\n\n".join(program)], tmp_path, TORCHINDUCTOR_COMPILE_THREADS="1")
    for words in starts(page) if full else []:
        ran([sys.executable, "-m", "torch.distributed.run", *words[1:]], tmp_path)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Outputs, results and data of scripts lie in this test's own folder."""
    for folder in ("OUTPUTS", "RESULTS", "DATA"):
        monkeypatch.setenv(f"GKL_{folder}", str(tmp_path / folder.lower()))
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_exist_and_take_what_is_shown(
    page: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """make knows the target, the script is there, and what it is given it understands; files that the page has are there."""
    monkeypatch.chdir(elsewhere)
    for block in blocks(page, "python"):
        if block.title.endswith(".py"):
            Path(block.title).write_text(block.text)
    for words in commands(page):
        for word in words:
            if re.fullmatch(r"(model|teacher|tower)\.checkpoint=\w+\.pt", word):
                Path(word.partition("=")[2]).touch()
        match words:
            case ["make", *arguments]:
                if shutil.which("make"):
                    made = list(recipe(arguments))
                    assert made, f"make {shlex.join(arguments)} does nothing"
                    for line in made:
                        understood(line, composed=not blocks(page, "diff"))
            case ["python", script, *_] if script.startswith("scripts/"):
                understood(words, composed=not blocks(page, "diff"))
            case ["python" | "torchrun", *_]:
                files = [word for word in words if word.endswith(".py")]
                modules = [after for word, after in pairwise(words) if word == "-m"]
                assert files or modules, words
                assert {*files} <= {block.title for block in blocks(page, "python")}, words
                assert all(importlib.util.find_spec(module) for module in modules), words
            case ["pip", "install", "."]:
                pass
            case _:
                pytest.fail(f"{name(page)} shows {shlex.join(words)}, which nothing here checks")


def recipe(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The commands that make would start, their words."""
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("GKL_RESULTS", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    }
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, f"make {shlex.join(arguments)}: {done.stderr}"
    for line in done.stdout.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


def understood(words: Sequence[str], *, composed: bool) -> None:
    """The script of a command is there, and takes its arguments: composed, or where it composes nothing, known to it."""
    at = next(
        (n for n, word in enumerate(words) if re.fullmatch(r"(scripts|benchmarks)/\w+\.py", word)), None
    )
    if at is None:
        return
    assert (ROOT / words[at]).is_file(), words[at]
    arguments = [word for word in words[at + 1 :] if not word.startswith((">", "&", "|"))]
    if ">" in words:
        arguments.remove(words[words.index(">") + 1])
    script = Path(words[at]).stem
    if words[at].startswith("scripts") and composed:
        KNOWN[script](arguments)


def train(arguments: list[str]) -> None:
    config = compose("train", [a for a in arguments if a != "--cfg"])
    check(config, processes(config))


def reproduce(arguments: list[str]) -> None:
    """The first of the rows and columns that are asked for: the others differ by their names alone, which are looked up.

    A table as it stands in configs/ is composed by other tests.
    """
    settings, overrides = read_settings(arguments)
    kind = "figure" if settings["figure"] is not None else "table"
    table = load_table(settings[kind], kind)
    runnable = [row["id"] for row in table["rows"] if experiments(table, row)]
    rows, columns = (
        settings["rows"] or runnable,
        settings["columns"] or list(table.get("columns", {})) or None,
    )
    assert {*rows} <= {*runnable} and {*(columns or ())} <= {*table.get("columns", {})}, arguments
    if {*overrides} <= {"devices=1"} and not (settings["rows"] or settings["columns"]):
        return
    plan = cells(
        table, scale=settings["scale"], protocol=settings["protocol"], seeds=[0], rows=rows[:1],
        columns=columns and columns[:1], overrides=overrides,
    )  # fmt: skip
    for cell in plan:
        check(cell.config, processes(cell.config))


def sweep(arguments: list[str]) -> None:
    settings, overrides = read_settings(arguments)
    found = read_sweep(overrides)
    assert found.searched == (settings["trials"] is not None)
    if not found.searched:
        planned(found, found.grid()[:1], settings)


def evaluate(arguments: list[str]) -> None:
    check_values(compose("evaluate", loaded("evaluate").with_published(arguments)[0]))


def settings_of(script: str, *known: str) -> Callable[[list[str]], None]:
    """Those of a script, by default its SETTINGS."""

    def look(arguments: list[str]) -> None:
        taken = known or tuple(loaded(script).SETTINGS)
        assert {argument.partition("=")[0] for argument in arguments} <= {*taken}, (script, arguments)

    return look


KNOWN: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "reproduce": reproduce,
    "sweep": sweep,
    "evaluate": evaluate,
    "prepare": settings_of("prepare"),
    "release": settings_of("release"),
    "dashboard": settings_of("dashboard"),
    "report": settings_of("report", "page"),
    "claims": lambda words: train([*read_settings(words)[1], "experiment=at/c100_basic_gkl"]),
    "doctor": settings_of("doctor", "-"),
}


# --- diffs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the repository with a page's diffs applied."""
    copy = tmp_path / "repository"
    left_out = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for part in ("configs", "gkl", "trainers", "scripts"):
        shutil.copytree(ROOT / part, copy / part, ignore=left_out)
    for part in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / part, copy)
    for number, block in enumerate(blocks(request.param, "diff")):
        (tmp_path / f"{number}.diff").write_text(block.text)
        ran(["git", "apply", str(tmp_path / f"{number}.diff")], copy, GIT_CEILING_DIRECTORIES=str(tmp_path))
    for block in blocks(request.param, "python"):
        (copy / block.title).write_text(block.text)
    return copy


DIFFS = [page for page in PAGES if blocks(page, "diff")]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git on the PATH")
@pytest.mark.parametrize(
    ("page", "changed"), [pytest.param(p, p, id=p.stem) for p in DIFFS], indirect=["changed"]
)
def test_diffs_apply_and_are_as_the_repository_writes(page: Path, changed: Path) -> None:
    """What the index says is written: so many files; and the linter takes them."""
    added = re.findall(r"^\+\+\+ b/(\S+)$", page.read_text(), re.MULTILINE)
    assert added and all((changed / file).is_file() and not (ROOT / file).exists() for file in added)
    sources = [file for file in added if file.endswith(".py")]
    for check_only in (["check"], ["format", "--check"]):
        if sources:
            ran([sys.executable, "-m", "ruff", *check_only, *sources], changed)


@pytest.mark.long  # a copy of the repository for each page
@pytest.mark.skipif(not shutil.which("git"), reason="needs git on the PATH")
@pytest.mark.parametrize(
    ("page", "changed"),
    [pytest.param(p, p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in DIFFS],
    indirect=["changed"],
)
def test_diffs_do_what_their_page_says(page: Path, changed: Path, tmp_path: Path) -> None:
    """Slow: the pages that train several networks."""
    folders = {f"GKL_{name.upper()}": str(tmp_path / name) for name in ("outputs", "results", "data")}
    python = [words for words in commands(page) if words[0] == "python"]
    assert python
    for words in python:
        said = ran(
            [sys.executable, *words[1:]], changed, PYTHONPATH=str(changed), CUDA_VISIBLE_DEVICES="", **folders
        )
        if words[1] == "scripts/train.py":
            assert "; record " in said, said
        if "plan=true" in words:
            assert "runs done" in said and "gkl_plain" in said, said


# --- words and numbers ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_first_screen_says_all() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    first = "\n".join(text.splitlines()[:40])
    for words in (
        "pip install .",
        "make table3 SCALE=smoke",
        "gkl_loss(",
        "docs/index.md",
        "docs/using-the-loss.md",
    ):
        assert words in first, words


def test_the_readme_shows_what_the_records_say() -> None:
    """Three lines of the ledger, at the scale that the words before them name."""
    shown = (ROOT / "README.md").read_text().split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    source = (ROOT / "results/claims.md").read_text()
    there = [cut(line) for line in source.splitlines() if line.startswith("| ") and ", small, 5,000 " in line]
    rows = [cut(line) for line in shown.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3
    for row in rows:
        table = re.search(r"Table \w+", row[0])
        assert (
            table
            and sum(whole[2:] == row[2:] and whole[1].startswith(f"{table[0]}, ") for whole in there) == 1
        ), row


def cut(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_coverage_says_what_is_built_and_run() -> None:
    text = (ROOT / "docs/coverage.md").read_text()
    rows = [cut(line) for line in text.split("## Figures")[0].splitlines() if re.match(r"\| [IVX]+ ", line)]
    assert list(dict.fromkeys(row[0] for row in rows)) == ROMAN
    made = {row[2].strip("`"): row for row in rows}
    assert {target for target in made if target.startswith("table")} == {f"table{n}" for n in tables()}
    assert not [row for row in rows if row[2] == "not built"]
    for number, file in tables().items():
        row = made[f"table{number}"]
        assert ROMAN[int(re.match(r"\d+", number)[0]) - 1] == row[0]  # type: ignore[index]
        assert row[3:] == with_numbers(ROOT / f"results/tables/{file.stem}.md"), row
    figures = [cut(line) for line in text.splitlines() if re.match(r"\| \d ", line)]
    assert {row[2].strip("`") for row in figures} == {f"figure{n}" for n in tables("figure")}
    assert [row[0] for row in figures] == ["1", "2", "3", "4"]


def with_numbers(table: Path) -> list[str]:
    """Of a table as it was last drawn, `rows with numbers of all rows` at scale paper, small and smoke."""
    found, count = dict.fromkeys(("paper", "small", "smoke"), 0), 0
    for section in re.split(r"^## ", table.read_text(), flags=re.MULTILINE)[1:]:
        (scale,) = re.findall(r"scale `(\w+)`", section.splitlines()[0])
        states = [cut(line)[-1] for line in section.splitlines() if line.startswith("|")][2:]
        count = len(states)
        found[scale] = max(found[scale], sum(not state.startswith(("missing", "not ")) for state in states))
    return [f"{number} of {count}" for number in found.values()]


def test_figures_of_speed_are_those_that_were_measured() -> None:
    """Each ratio of the page stands, rounded alike, in what the benchmarks wrote."""
    tables_shown = [
        line for line in (ROOT / "docs/performance.md").read_text().splitlines() if line.startswith("| ")
    ]
    measured = {*re.findall(r"\d+\.\d\d", (ROOT / "results/benchmarks/README.md").read_text())}
    shown = {ratio for line in tables_shown for ratio in re.findall(r"\b\d+\.\d\d\b", cut(line)[-1])}
    assert len(shown) > 15 and shown <= measured, shown - measured


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES])
def test_files_and_names_that_a_page_speaks_of_exist(page: Path) -> None:
    text = page.read_text()
    added = set(re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for word in re.findall(r"`([^`\s]+)`", prose):
        if word.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not re.search(r"[<…*]", word):
            assert (ROOT / word).exists() or word in added or word == "results/sweeps", word
        if re.fullmatch(r"(gkl|trainers)(\.\w+)+", word):
            assert named(word), word
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def named(dotted: str) -> bool:
    """Whether there is such a module, or such a name in one."""
    parts = dotted.split(".")
    for cut_at in range(len(parts), 0, -1):
        try:
            there: Any = importlib.import_module(".".join(parts[:cut_at]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut_at:]:
            there = getattr(there, part, None)
        return there is not None
    return False


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs mkdocs: pip install 'gkl[docs]'")
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    ran(words, ROOT, NO_MKDOCS_2_WARNING="1")
    for page in PAGES[2:]:
        html = (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text()
        assert "<h1" in html and "--8&lt;--" not in html, page
    api = (tmp_path / "site/api.html").read_text()
    for public in ("gkl_loss", "GKLLoss", "ClassPrior", "kl", "dkl", "ikl", "jsd"):
        assert re.search(rf'id="gkl\.losses\.\w+\.{public}"', api), public
    assert not (tmp_path / "site/docstrings.py").exists()
