"""The report page in a real browser and the wandb workspaces: every number a record's, nothing asked of anyone outside."""

import importlib.util
import json
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import ConfigError
from trainers.reports import page as page_module
from trainers.reports.dashboard import compared, panels_of, preview, runs_of, spec, workspace
from trainers.reports.ledger import ledger
from trainers.reports.page import LIMIT_BYTES, command, page
from trainers.reports.render import sections
from trainers.runs.compose import compose
from trainers.runs.identity import config_hash
from trainers.runs.plan import cells, load_table, tables
from trainers.runs.records import read_records

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "results"
SHOWN = {
    "table": ("3", "12"),
    "figure": ("1",),
}  # of each kind one; a browser draws all 150 charts in a minute


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return read_records(RESULTS / "runs")


@pytest.fixture(scope="module")
def built(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two tables and a figure, built now, in a folder with nothing else."""
    for package in ("altair", "vl_convert"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'gkl[report]'")
    path = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            page_module,
            "tables",
            lambda kind="table": {k: v for k, v in tables(kind).items() if k in SHOWN[kind]},
        )
        path.write_text(page(records, RESULTS, ledger(records)), encoding="utf-8")
    return path


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL
    )
    assert found
    return dict(json.loads(found[1]))


def test_the_committed_page_is_of_the_committed_records(records: list[dict[str, Any]]) -> None:
    path = RESULTS / "report.html"
    runs = {run["path"]: run for run in embedded(path)["runs"]}
    assert runs.keys() == {record["path"] for record in records}
    for record in records:
        assert runs[record["path"]]["metrics"] == {k: round(v, 2) for k, v in record["metrics"].items()}
    assert path.stat().st_size < LIMIT_BYTES
    text = path.read_text()
    for number in tables():
        title = load_table(number)["title"].replace("&", "&amp;").replace("'", "&#39;")
        assert title in text, number
    numbers = {run["path"]: n for n, run in enumerate(embedded(path)["runs"])}
    for claim in ledger(records):
        assert claim.text.replace("'", "&#39;") in text
        for line in claim.lines:  # a click on its difference opens its runs
            behind = " ".join(str(numbers[path]) for path in line.records)
            assert f'data-runs="{behind}" data-metric="{line.metric}"' in text, line


def test_the_page_asks_for_no_other_file(built: Path) -> None:
    text = built.read_text().partition('<script id="vega"')[0]
    assert text.endswith("</script>\n")
    assert not re.findall(r"<(?:link|img|iframe|source|video)\b|\bsrc=|@import|url\(", text)


def test_a_run_s_command_composes_to_its_identity(records: list[dict[str, Any]]) -> None:
    """What the page says to type is the run: one record of every experiment's scale and protocol, and every changed one."""
    chosen = {(r["experiment"], r["scale"], r["protocol"], json.dumps(r["departures"])): r for r in records}
    some = [r for r in chosen.values() if r["experiment"].startswith("at/")]
    assert len(some) > 30
    for record in some:
        words = command(record).split(" ", 2)
        assert words[:2] == ["python", "scripts/train.py"]
        overrides = shlex.split(words[2])
        if "data.root=PATH" in overrides:
            continue  # pictures of one's own
        again = config_hash(compose("train", overrides)) == record["config_hash"]
        assert again, record["path"]


def test_without_altair_the_command_says_what_to_install(
    records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("altair", reason="needs altair: pip install 'gkl[report]'")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r"pip install 'gkl\[report\]'"):
        page(records, RESULTS)


# --- charts and what draws them -------------------------------------------------------------------------------------------


def test_every_chart_is_valid(records: list[dict[str, Any]]) -> None:
    """One of each form, by Altair's schema, which sees none of them while the page is made."""
    alt = pytest.importorskip("altair", reason="needs altair: pip install 'gkl[report]'")
    parts = {kind: page_module._parts(kind, records) for kind in ("table", "figure")}
    made = page_module._charts(parts, RESULTS / "runs")
    forms: dict[tuple[str, str], dict[str, Any]] = {}
    for section, found in made.items():
        for chart in (chart for _, some in found for chart in some):
            assert chart["data"]["values"] and chart["width"] == "container"
            assert all(chart[key] for key in ("title", "description", "height"))
            asked = re.findall(r'"field": "(\w+)"', json.dumps(chart))
            assert set(asked) <= {key for value in chart["data"]["values"] for key in value} | {"seeds"}
            told = {key: value for key, value in chart.items() if key not in ("data", "description", "title")}
            forms.setdefault((section, re.sub(r'"(domain|range)": \[.*?\]', "", json.dumps(told))), chart)
    assert {section for section, _ in forms} == made.keys() and len(forms) >= 9
    for chart in list(forms.values())[:40]:
        alt.Chart.from_dict(chart)  # raises for what the schema does not know


def test_the_script_is_that_of_the_page_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled once; again for a script that has changed, another version or none."""
    vl_convert = pytest.importorskip("vl_convert", reason="needs vl_convert: pip install 'gkl[report]'")
    bundled: list[str] = []

    def bundle(snippet: str) -> str:
        bundled.append(snippet)
        return "let a = '</script>';"

    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    path = tmp_path / "report.html"
    text, digest = page_module._javascript(path)
    assert text == "let a = '<\\/script>';" and len(bundled) == 1
    whole = f'<p>before</p><script id="vega" data-digest="{digest}">{text}</script><script>more</script>'
    path.write_text(whole)
    assert page_module._javascript(path) == (text, digest) and len(bundled) == 1
    for number, other in enumerate((whole.replace("let a", "let b"), whole.replace(digest, "0" * 64), ""), 2):
        path.write_text(other)
        assert page_module._javascript(path) == (text, digest) and len(bundled) == number
    path.write_text(whole)
    monkeypatch.setattr(page_module, "version", lambda name: "0.0")
    assert page_module._javascript(path)[1] != digest and len(bundled) == 5


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Any, built: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page on a desktop, and all that it complained of or asked for."""
    heard: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith(built.as_uri()) else heard.append(request.url),
    )
    tab.goto(built.as_uri())
    yield tab, heard
    context.close()


@pytest.mark.browser
def test_it_loads_without_a_word_or_a_request_and_draws_every_chart(opened: tuple[Any, list[str]]) -> None:
    tab, heard = opened
    count = tab.locator(".chart").count()
    assert count > 5
    for number in range(count):
        tab.locator(".chart").nth(number).scroll_into_view_if_needed()
    tab.wait_for_function(
        "document.querySelectorAll('.chart:not([data-drawn])').length === 0", timeout=60_000
    )
    assert tab.locator(".chart svg").count() == count
    marks = tab.evaluate(
        "[...document.querySelectorAll('.chart svg')].map(s => s.querySelectorAll('path,text').length)"
    )
    assert min(marks) > 10 and heard == []


@pytest.mark.browser
def test_every_number_equals_its_records_and_opens_them(
    opened: tuple[Any, list[str]], records: list[dict[str, Any]]
) -> None:
    tab, heard = opened
    by_path = {record["path"]: record for record in records}
    runs = tab.evaluate("data.runs.map(run => run.path)")
    buttons = tab.evaluate(
        "[...document.querySelectorAll('.part button.n')].map(b => [b.dataset.runs, b.dataset.metric, b.textContent])"
    )
    assert len(buttons) > 30
    for numbers, metric, text in buttons:
        values = [by_path[runs[int(n)]]["metrics"][metric] for n in numbers.split()]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        assert text == f"{statistics.mean(values):.2f}{spread} ({len(values)})"
    button = tab.locator("button.n").first
    button.focus()
    tab.keyboard.press("Enter")  # by keyboard alone
    dialog = tab.locator("dialog[open]")
    first = by_path[runs[int(buttons[0][0].split()[0])]]
    shown = dialog.inner_text()
    assert (
        first["path"] in shown
        and f"experiment={first['experiment']}" in shown
        and first["code"]["commit"][:9] in shown
    )
    assert dialog.locator("a").first.get_attribute("href") == f"runs/{first['path']}"
    tab.keyboard.press("Escape")
    assert tab.locator("dialog[open]").count() == 0 and heard == []


@pytest.mark.browser
def test_every_difference_of_a_claim_is_its_records_and_opens_them(
    opened: tuple[Any, list[str]], records: list[dict[str, Any]]
) -> None:
    """The records behind it stand as pairs: ours, the other, seed by seed."""
    tab, heard = opened
    metrics = {record["path"]: record["metrics"] for record in records}
    runs = tab.evaluate("data.runs.map(run => run.path)")
    buttons = tab.locator("section:has(> #claims) button.n")
    assert buttons.count() > 20
    measured = [
        b for b in buttons.all() if not (b.get_attribute("data-metric") or "").startswith("mean class margin")
    ]
    assert (
        len(measured) == buttons.count() - 1
    )  # Figure 4's margins are an assessment's, looked at in test_ledger
    for button in measured:
        behind = [metrics[runs[int(n)]] for n in (button.get_attribute("data-runs") or "").split()]
        shared = set.intersection(*({name for name in found} for found in behind))
        means = [
            statistics.mean(
                ours[name] - other[name] for ours, other in zip(behind[::2], behind[1::2], strict=True)
            )
            for name in shared
        ]
        assert button.inner_text() in {f"{mean:+.2f} ({len(behind) // 2})" for mean in means}
    last = buttons.last
    claim = last.evaluate("button => button.closest('section').querySelector('h3').textContent")
    last.click()
    dialog = tab.locator("dialog[open]").inner_text()
    assert dialog.count("Record: ") == len((last.get_attribute("data-runs") or "").split())
    assert claim.split(".")[0] in dialog and heard == []


@pytest.mark.browser
def test_filters_hide_what_they_leave_out_and_stay_in_the_address(opened: tuple[Any, list[str]]) -> None:
    tab, heard = opened
    visible = "[...document.querySelectorAll('.part')].filter(p => !p.hidden)"
    everything = tab.evaluate(f"{visible}.length")
    tab.select_option("#scale", "small")
    scales = tab.evaluate(f"[...new Set({visible}.map(p => p.dataset.scale))]")
    assert scales == ["small"] and 0 < tab.evaluate(f"{visible}.length") < everything
    assert "scale=small" in tab.url
    tab.select_option("#table", "table12")
    assert tab.evaluate(f"[...new Set({visible}.map(p => p.dataset.table))]") in (["table12"], [])
    tab.select_option("#scale", "")
    tab.select_option("#table", "")
    assert tab.evaluate(f"{visible}.length") == everything
    assert tab.locator("#shown").inner_text().endswith("tables shown") and heard == []


@pytest.mark.browser
def test_on_a_phone_and_in_the_dark_it_can_be_read(browser: Any, built: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    tab = context.new_page()
    tab.goto(built.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    light = "(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3)"
    text, back = (
        tab.evaluate(f"{light}(getComputedStyle(document.body).{name})")
        for name in ("color", "backgroundColor")
    )
    assert text - back > 150
    context.close()


# --- wandb workspaces -------------------------------------------------------------------------------------------------


def test_every_committed_workspace_is_what_the_records_give(records: list[dict[str, Any]]) -> None:
    """Built again, byte for byte; no panel asks for what no run has logged; the baseline is among its runs."""
    pytest.importorskip(
        "wandb_workspaces.workspaces", reason="needs wandb-workspaces: pip install 'gkl[dashboard]'"
    )
    for number in ("3", "6"):
        config = load_table(number)
        found = [t for t in sections(config, records) if compared(config, t)]
        table = max(found, key=lambda t: sum(map(len, runs_of(config, compared(config, t))[1].values())))
        made = spec(workspace(config, table, RESULTS / "runs", project="gkl", entity=""))
        committed = RESULTS / "dashboard" / f"{config['name']}.json"
        assert json.dumps(made, indent=1) + "\n" == committed.read_text(), number
        _, groups = runs_of(config, compared(config, table))
        runs = [record for group in groups.values() for record in group]
        logged = {key for record in runs for key in _history(record)[-1]}
        measured = {name for record in runs for name in record["metrics"]}
        for panel in panels_of(made):
            asked = [m.removeprefix("summary:") for m in panel["config"].get("metrics", [])]
            assert set(asked) <= logged | measured, panel
        assert len(groups) > 1 and any("kl" in name for name in groups)
        assert preview(made, config, table, RESULTS / "runs").axes


def _history(record: dict[str, Any]) -> list[dict[str, Any]]:
    path = (RESULTS / "runs" / record["path"]).with_name(record["history"])
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is left to do ---------------------------------------------------------------------------------------------------


def test_the_doctor_counts_what_a_plan_counts(
    records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without composing; with an assessment (Table XIV), with columns (XVIII) and with rows that share runs (X)."""
    spec_of = importlib.util.spec_from_file_location("doctor", ROOT / "scripts" / "doctor.py")
    assert spec_of and spec_of.loader
    doctor = importlib.util.module_from_spec(spec_of)
    spec_of.loader.exec_module(doctor)
    monkeypatch.setenv("GKL_RESULTS", str(RESULTS))
    monkeypatch.setattr(doctor, "compose", None)
    doctor.report_tables()
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told.keys() == {f"table {number}" for number in tables()}
    for number in ("10", "14", "18"):
        plan = cells(load_table(number), scale="smoke", protocol="official")
        done = sum(cell.status == "done" for cell in plan)
        assert told[f"table {number}"].endswith(f"smoke {done}/{len(plan)} runs") and done
    fewer = [record for record in records if record["experiment"] != "kd/c100_kd/vgg13_mobilenetv2"]
    table = load_table("18")
    assert len(doctor.done_of(table, fewer, "smoke")) == len(doctor.done_of(table, records, "smoke")) - 1
