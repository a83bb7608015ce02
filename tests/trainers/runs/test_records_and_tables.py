"""Records, tables and plans: what was run is never lost, mixed up or dressed up."""

import copy
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from markdown import markdown as markdown_to_html

from trainers.errors import ConfigError, RunError
from trainers.reports.render import render, sections
from trainers.reports.tables import (
    build,
    comparison_lines,
    latex,
    markdown,
    paired_half_width,
    place,
    settings,
)
from trainers.runs.compose import compose, published, usual
from trainers.runs.cost import (
    Rate,
    Uncounted,
    disk_bytes,
    forward_flops,
    measured_rate,
    needed_flops,
    recorded_size,
)
from trainers.runs.identity import asked, config_hash, differences, training_hash, without_excluded
from trainers.runs.launch import startable
from trainers.runs.launchers.local import LocalJob
from trainers.runs.plan import (
    Cell,
    cells,
    claims,
    device_hours,
    experiments,
    load_table,
    summary,
    tables,
)
from trainers.runs.records import (
    SCHEMA,
    is_whole,
    read_record,
    read_records,
    record_path,
    validate,
    write_record,
)
from trainers.runs.settings import check

ROOT = Path(__file__).resolve().parents[3]


def config(*overrides: str) -> dict:
    return compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", *overrides])


def record(
    aa: float, seed: int = 0, scale: str = "smoke", overrides: tuple[str, ...] = (), **change: object
) -> dict:
    resolved = compose(
        "train", ["experiment=at/c100_basic_gkl", f"scale={scale}", f"seed={seed}", *overrides]
    )
    stand_in = None if scale == "paper" else "cifar100"
    made = {
        "schema": 2,
        "experiment": resolved["experiment"],
        "scale": scale,
        "protocol": "official",
        "seed": seed,
        "config_hash": config_hash(resolved),
        "config": without_excluded(resolved),
        "overrides": asked(resolved["overrides"]),
        "changed": {key: value for key, (_, value) in differences(usual(resolved), resolved).items()},
        "departures": differences(published(resolved), resolved),
        "status": "done",
        "metrics": {"clean": 60.0, "aa": aa},
        "evaluation": {"n": 60 if stand_in else 360},
        "history": "seed0.jsonl",
        "checkpoint": {"path": "x", "sha256": "0"},
        "code": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {},
        "hardware": {"device": "cpu", "count": 1, "name": "a processor"},
        "data": {"name": "digits" if stand_in else "cifar100", "stand_in_for": stand_in, "sha256": "0",
                 "train": 1437, "test": 360},
        "cost": {"seconds": 1.0, "device_hours": 0.5, "peak_memory_bytes": 1},
        "finished": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    return {**made, **change}


# --- what makes a run the same run ------------------------------------------------------------------------------------


def test_the_hash_is_of_what_is_computed_and_not_where_or_how() -> None:
    base = config_hash(config())
    for same in (
        "seed=3",
        "device=cpu",
        "devices=2",
        "logger=off",
        "checkpoint_minutes=1",
        "paths.outputs=/elsewhere",
    ):
        assert config_hash(config(same)) == base, same
    assert config_hash(config("loss.alpha=20")) == base  # 20 and 20.0
    for other in (
        "loss.alpha=21",
        "epochs=11",
        "precision=bf16",
        "loss.break_asymmetry=false",
        "method.awp_gamma=0",
    ):
        assert config_hash(config(other)) != base, other
    for other in ("evaluation.images=4", "evaluation=screen", "evaluation.epsilon=0.01", "evaluate=last"):
        assert config_hash(config(other)) != base, other
        assert training_hash(config(other)) == training_hash(config()), other
    assert training_hash(config("epochs=11")) != training_hash(config())
    data = config("data=image_folder", "data.root=a")
    assert config_hash(data) == config_hash(config("data=image_folder", "data.root=b"))
    assert "root" not in without_excluded(data)["data"] and "paths" not in without_excluded(data)


@pytest.mark.parametrize("word", ["checkpoint", "cache", "root", "folder"])
def test_an_option_of_an_own_network_counts_whatever_its_name(word: str, tmp_path: Path) -> None:
    """Two widths called so were once one run, and the second got the first one's numbers."""
    (tmp_path / "net.py").write_text("def Net(num_classes, **options): ...")
    network = (f"model={tmp_path / 'net.py'}:Net", f"paths.outputs={tmp_path}")
    four, eight = (config(*network, f"model.options={{{word}: {width}}}") for width in (4, 8))
    assert config_hash(four) != config_hash(eight) and training_hash(four) != training_hash(eight)
    assert asked([f"model.options.{word}=4"]) == [f"model.options.{word}=4"]


@pytest.mark.parametrize(
    ("experiment", "measured", "trained"),
    [
        ("llava/baseline", ("data.asked=[gqa]", "method.longest_answer=9"), ("data.length=99", "method.projector_lr=0.1")),
        ("seg/baseline", ("data.long_side=99", "method.mirrored=false"), ("data.image_size=41", "method.aux_weight=0.1")),
    ],
)  # fmt: skip
def test_what_is_read_in_the_measurement_alone_trains_nothing_anew(
    experiment: str, measured: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    """Once a benchmark more, or test pictures of another size, had LLaVA and PSPNet trained again."""

    def composed(*words: str) -> dict[str, Any]:
        return compose("train", [f"experiment={experiment}", "scale=paper", *words])

    base = composed()
    for word in (*measured, *trained):
        assert config_hash(composed(word)) != config_hash(base), word
        assert (training_hash(composed(word)) == training_hash(base)) == (word in measured), word


def test_a_setting_that_is_null_leaves_earlier_runs_their_hash() -> None:
    base = config()
    later = copy.deepcopy(base)
    later["method"]["something_new"] = None
    assert config_hash(later) == config_hash(base)


def test_a_record_keeps_the_words_that_change_what_is_computed() -> None:
    """A folder of this machine stands as PATH; where, how often and how loudly a run is done is left out."""
    assert asked(
        ["data=image_folder", "data.root=/home/me/scans", "+data.root=/home/me/scans", "teacher.folder=/home/me/teachers",
         "device=cpu", "devices=2", "workers=4", "accumulate=2", "graph=false", "checkpoint_minutes=1", "seed=3",
         "logger=off", "logger.mode=online", "launcher=slurm", "+launcher.extra.qos=low", "paths.outputs=/scratch/me",
         "assessment=attacks", "data.download=false", "teacher.cache=null", "loss=gkl", "~loss.weight", "loss.gamma=0.2",
         "+generated.images=50", "optimizer@strategy_optimizer=sgd"]
    ) == [
        "data=image_folder", "data.root=PATH", "data.root=PATH", "teacher.folder=PATH", "loss=gkl", "~loss.weight",
        "loss.gamma=0.2", "+generated.images=50", "optimizer@strategy_optimizer=sgd",
    ]  # fmt: skip
    typed = config(
        "seed=3", "protocol=official", "device=cpu", "logger=off", "data=image_folder", "data.root=/home/me"
    )
    assert typed["overrides"] == ["device=cpu", "logger=off", "data=image_folder", "data.root=/home/me"]
    assert asked(typed["overrides"]) == ["data=image_folder", "data.root=PATH"]


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_written_once_and_read_back(tmp_path: Path) -> None:
    made = record(30.0)
    path = write_record(tmp_path, made)
    assert path == record_path(tmp_path, "at/c100_basic_gkl", "smoke", made["config_hash"], 0)
    assert read_record(path) == json.loads(json.dumps(made)) and write_record(tmp_path, made) == path
    with pytest.raises(RunError, match="holds another record of the same run; records are never changed"):
        write_record(tmp_path, record(31.0))
    assert read_record(path)["metrics"]["aa"] == 30.0 and list(path.parent.iterdir()) == [path]
    write_record(tmp_path, record(31.0, seed=1))
    assert [r["seed"] for r in read_records(tmp_path)] == [0, 1]


def test_a_second_result_of_a_run_leaves_the_first_ones_history(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0), '{"epoch": 1}\n')
    with pytest.raises(RunError, match="never changed"):
        write_record(tmp_path, record(31.0), '{"epoch": 2}\n')
    assert path.with_suffix(".jsonl").read_text() == '{"epoch": 1}\n'


@pytest.mark.parametrize("damage", ["cut", "empty", "nan", "list", "binary"])
def test_a_damaged_record_is_named_counts_as_missing_and_is_kept(damage: str, tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0), '{"epoch": 1}\n')
    write_record(tmp_path, record(31.0, seed=1))
    whole = path.read_text()
    path.write_bytes(
        {
            "cut": whole[:100].encode(),
            "empty": b"",
            "nan": whole.replace('"device_hours": 0.5', '"device_hours": NaN').encode(),
            "list": b"[]",
            "binary": b"\xff\xfe\x00",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"record .*seed0\.json is damaged"):
        read_record(path)
    found = read_records(tmp_path)
    assert [r["seed"] for r in found] == [1]
    (line,) = found.damaged
    assert re.fullmatch(r"record .*seed0\.json is damaged: .*; it counts as missing", line)
    assert not is_whole(path)
    harmed = path.read_bytes()
    write_record(tmp_path, record(30.0), '{"epoch": 2}\n')  # its run, done again
    assert is_whole(path) and path.read_text() == whole and read_records(tmp_path).damaged == []
    assert path.with_name("seed0.json.damaged").read_bytes() == harmed
    assert path.with_suffix(".jsonl").read_text() == '{"epoch": 2}\n'


def test_a_copy_of_a_record_counts_once(tmp_path: Path) -> None:
    """A backup beside the records once made two seeds of one, of spread 0."""
    path = write_record(tmp_path, record(30.0))
    shutil.copytree(tmp_path / "at", tmp_path / "Backup" / "at")
    (found,) = read_records(tmp_path)
    assert found["path"] == str(path.relative_to(tmp_path)) and read_records(tmp_path).damaged == []
    copy = tmp_path / "Backup" / path.relative_to(tmp_path)
    copy.write_text(path.read_text().replace("30.0", "31.0"))
    found = read_records(tmp_path)
    assert [r["metrics"]["aa"] for r in found] == [30.0]
    assert re.fullmatch(
        r"record .*Backup.* is another one of the run of .*; it counts as missing", found.damaged[0]
    )


@pytest.mark.parametrize("place", ["seed1.json", "../0123456789ab/seed0.json", "../copy/seed0.json"])
def test_a_record_in_another_run_s_place_is_none(place: str, tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0))
    other = (path.parent / place).resolve()
    other.parent.mkdir(exist_ok=True)
    shutil.copy(path, other)
    found = read_records(tmp_path)
    assert len(found) == 1 and not is_whole(other) and is_whole(path)
    assert re.fullmatch(
        r"record .* is of seed 0 of .*, and lies where another run's would.*", found.damaged[0]
    )


def test_measurements_of_one_training_go_one_after_the_other() -> None:
    plan = [
        Cell("row", config(*own))
        for own in (["evaluation.images=4"], ["evaluation.images=8"], ["seed=1"], [])
    ]
    first = startable(plan, [])
    assert [cell.config["seed"] for cell in first] == [0, 1] and first[0] is plan[0]
    job = LocalJob(plan[0], Path("run.log"), 0, None)  # type: ignore[arg-type]
    assert startable(plan[1:], [job]) == [plan[2]]


def test_a_later_version_s_record_is_no_damage(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0))
    text = path.read_text().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}')
    path.write_text(text)
    for reader in (is_whole, read_record):
        with pytest.raises(
            RunError, match=rf"is of schema {SCHEMA + 1}, which a later version of gkl has written"
        ):
            reader(path)
    with pytest.raises(RunError, match="a later version"):
        write_record(tmp_path, record(30.0))
    assert path.read_text() == text and len(read_records(tmp_path).damaged) == 1


def test_a_damaged_assessment_takes_nothing_from_its_record(tmp_path: Path) -> None:
    path = write_record(tmp_path, record(30.0))
    path.with_name("seed0.attacks.json").write_text("{")
    found = read_records(tmp_path)
    assert [r["metrics"]["aa"] for r in found] == [30.0] and "seed0.attacks.json is damaged" in found.damaged[
        0
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "schema 1 is not 2"),
        ({"seed": "0"}, r"needs seed \(int\), got '0'"),
        ({"status": "nearly"}, "done or failed, got 'nearly'"),
        ({"metrics": {"aa": 101.0}}, "metric aa must be a percentage, got 101.0"),
        ({"metrics": {"aa": float("nan")}}, "percentage, got nan"),
        ({"metrics": {"aa": True}}, "percentage, got True"),
        ({"finished": "yesterday"}, "finished must look like"),
        ({"history": "/tmp/h.jsonl"}, "relative path"),
        ({"data": {"name": "digits"}}, "name and stand_in_for"),
        ({"config_hash": "0" * 12}, "config_hash 000000000000 is not that of the record's config"),
        ({"overrides": None}, r"needs overrides \(list\), got None"),
        ({"changed": None}, r"needs changed \(dict\), got None"),
    ],
)
def test_records_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate({**record(30.0), **change})


# --- tables -----------------------------------------------------------------------------------------------------------

TABLE = {
    "title": "A table",
    "target": "table3",
    "labels": {"method": "Method"},
    "metrics": {"aa": "AA"},
    "rows": [
        {"id": "other", "method": "Other", "experiment": None, "paper": {"aa": 28.86}, "note": "Copied."},
        {"id": "gkl", "method": "GKL_AT", "experiment": "at/c100_basic_gkl", "paper": {"aa": 31.91}},
    ],
}


def drawn(records: list[dict], scale: str, setting: dict | None = None) -> list[str]:
    records = [
        {**r, "path": f"{r['experiment']}/{r['scale']}/{r['config_hash']}/seed{r['seed']}.json"}
        for r in records
    ]
    built = build(TABLE, records, scale=scale, protocol="official", claims={}, setting=setting)
    latex(built)
    return markdown(built).splitlines()


def test_a_table_without_records_says_what_is_missing() -> None:
    lines = drawn([], "smoke")
    assert "| Other | 28.86 | – | – | not yet [1] |" in lines and "1. Copied." in lines
    assert "| GKL_AT | 31.91 | – | – | missing: make table3 SCALE=smoke ROWS=gkl |" in lines


def test_mean_spread_and_number_of_seeds() -> None:
    lines = drawn([record(30.0, 0), record(32.0, 1), record(34.0, 2)], "smoke")
    assert (
        "| GKL_AT | 31.91 | 32.00 ± 2.00, se 1.15 (3) | – | stand-in: digits for cifar100, wrn_10_1, 60 images attacked |"
        in lines
    )
    assert any("code 012345678;" in line and "60 attacked" in line for line in lines)
    assert any("compare it with other stand-ins alone" in line for line in lines)


def test_only_the_published_run_on_its_own_data_is_compared_with_the_paper() -> None:
    assert "| GKL_AT | 31.91 | 30.00 (1) | -1.91 | done |" in drawn([record(30.0, scale="paper")], "paper")
    stand_in = record(30.0, scale="paper", data=record(0.0)["data"], evaluation={"n": 60})
    assert "| GKL_AT | 31.91 | 30.00 (1) | – | stand-in: digits for cifar100, 60 images attacked |" in drawn(
        [stand_in], "paper"
    )


def test_different_runs_are_never_averaged() -> None:
    lines = drawn([record(30.0), record(40.0, overrides=("epochs=3",)), record(0.0, scale="small")], "smoke")
    assert (
        "| GKL_AT | 31.91 | 30.00 (1) | – | stand-in: digits for cifar100, wrn_10_1, 60 images attacked |"
        in lines
    )
    assert not any("40.00" in line or "35.00" in line or "20.00" in line for line in lines)
    two = [record(30.0), record(40.0, overrides=("epochs=3",))]
    shorter = two[1]["config"]
    setting = {key: value[1] for key, value in differences(record(0.0)["config"], shorter).items()}
    other = drawn(two, "smoke", setting)
    assert "epochs=3" in other[0] and any("| 40.00 (1) |" in line for line in other)
    assert not any("| 30.00 (1) |" in line for line in other)
    failed = drawn([record(30.0, status="failed")], "smoke")
    assert any("missing" in line for line in failed)


def of_recipe(aa: float, gamma: float, finished: str, seed: int = 0, **change: object) -> dict:
    """A run of the experiment when its own configuration had another gamma."""
    made = record(aa, seed, finished=finished, **change)
    made["config"]["loss"]["gamma"] = gamma
    return {**made, "config_hash": config_hash(made["config"])}


def test_two_recipes_of_one_experiment_stand_apart() -> None:
    """Both changed nothing, each of the experiment as it then was: the older ones are a setting of their own."""
    old = [of_recipe(20.0 + seed, 0.3, "2026-01-01T12:00:00Z", seed) for seed in (0, 1)]
    new = [record(30.0 + seed, seed, finished="2026-02-01T12:00:00Z") for seed in (0, 1)]
    both = {"changed": {"epochs": 3}}
    short = [
        of_recipe(10.0, 0.3, "2026-03-01T12:00:00Z", **both),
        record(15.0, **both),
    ]  # here the other is the later
    (one,), (other,) = {r["config_hash"] for r in old}, {r["config_hash"] for r in new}
    placed = place(TABLE, [*old, *new, *short], scale="smoke", protocol="official", claims={})
    assert [own for _, own in placed["gkl"]] == [
        {"recipe": one}, {"recipe": one}, {}, {}, {"epochs": 3}, {"epochs": 3, "recipe": other},
    ]  # fmt: skip
    assert settings(placed) == [{"epochs": 3, "recipe": other}, {"epochs": 3}, {"recipe": one}]
    assert any("| 30.50 ± 0.71, se 0.50 (2) |" in line for line in drawn([*old, *new, *short], "smoke"))
    lines = drawn([*old, *new, *short], "smoke", {"recipe": one})
    assert f"recipe={one}" in lines[0] and any("| 20.50 ± 0.71, se 0.50 (2) |" in line for line in lines)
    alone = place(TABLE, old, scale="smoke", protocol="official", claims={})
    assert [own for _, own in alone["gkl"]] == [{}, {}]


def test_placing_records_composes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table and figure from the committed records alone; the committed tables are these, byte for byte."""

    def refuse(*words: object) -> None:
        raise AssertionError(f"composed {words}")

    monkeypatch.setattr("trainers.runs.compose._composed", refuse)
    monkeypatch.setattr("hydra.compose", refuse)
    with pytest.raises(AssertionError, match="composed"):
        config()
    records = read_records(ROOT / "results/runs")
    shown = set()
    for number in tables():
        table = load_table(number)
        for path in render(table, records, tmp_path):
            assert path.read_text() == (ROOT / "results" / path.relative_to(tmp_path)).read_text(), path.name
        shown |= {r["path"] for built in sections(table, records) for row in built.rows for r in row.records}
    for number in tables("figure"):
        assert sections(load_table(number, "figure"), records)
    assert len(shown) > len(records) / 2


def strings(node):
    """Every text in a JSON value."""
    if isinstance(node, dict | list):
        return [
            text for child in (node.values() if isinstance(node, dict) else node) for text in strings(child)
        ]
    return [node] if isinstance(node, str) else []


def test_no_committed_record_names_a_folder_of_the_machine_that_made_it() -> None:
    paths = sorted((ROOT / "results/runs").rglob("*.json"))
    assert len(paths) > 250
    for path in paths:
        assert not [text for text in strings(json.loads(path.read_text())) if text.startswith("/")], path


@pytest.mark.long  # composes some hundred runs
def test_every_committed_record_composes_to_its_hash_and_what_it_changed(tmp_path: Path) -> None:
    """What was asked, of the same pictures at any place, is the run again: some hundred compositions."""
    for made in read_records(ROOT / "results/runs"):
        names = [f"{key}={made[key]}" for key in ("experiment", "scale", "protocol")]
        words = [override.replace("=PATH", f"={tmp_path}") for override in made["overrides"]]
        pictures = made["config"]["data"].get("content")  # which are not there
        composed = compose("train", [*names, *words, *([f"data.content={pictures}"] if pictures else [])])
        found = {key: value for key, (_, value) in differences(usual(composed), composed).items()}
        assert found == made["changed"], made["path"]
        assert asked(words) == made["overrides"], made["path"]
        assert config_hash(composed) == made["config_hash"], (
            made["path"],
            differences(made["config"], composed),
        )


def test_latex_is_escaped() -> None:
    built = build(TABLE, [], scale="smoke", protocol="official", claims={})
    text = latex(built)
    assert "GKL\\_AT & 31.91 & -- & -- & missing: make table3 SCALE{=}smoke ROWS{=}gkl \\\\" in text
    assert text.count("\\toprule") == text.count("\\bottomrule") == 1


def test_any_name_comes_out_as_it_is() -> None:
    """A row's label with every mark of the two languages; in Markdown read back by a parser."""
    name = "a|b ^2 {c} ~d~ _e_ f_g <h> *i* `j` \\k & 5% #6 $7 &amp;"
    table = {**TABLE, "rows": [{**TABLE["rows"][0], "method": name}]}
    built = build(table, [], scale="smoke", protocol="official", claims={})
    (row,) = [line for line in latex(built).splitlines() if line.startswith("a")]
    assert row.startswith(
        r"a\textbar{}b \textasciicircum{}2 \{c\} \textasciitilde{}d\textasciitilde{} \_e\_ f\_g $<$h$>$ *i* `j` \textbackslash{}k "
        r"\& 5\% \#6 \$7 \&amp; & "
    )
    page = markdown_to_html(markdown(built), extensions=["tables"])
    shown = re.search(r"<td[^>]*>(a.*?)</td>", page)
    assert shown and html.unescape(shown[1]) == name


def test_every_table_renders_and_its_paper_values_are_the_printed_ones(tmp_path: Path) -> None:
    """Against the numbers of the paper, typed in here once more from its pages."""
    printed = {
        "3": {
            "AWP": (60.38, 28.86),
            "LBGAT": (60.64, 29.33),
            "LAS-AT": (64.89, 30.77),
            "DM-AT": (72.58, 38.83),
        },
        "4": {
            "Rice et al.": (85.34, 53.42),
            "LBGAT": (88.70, 53.57),
            "AWP": (85.36, 56.17),
            "DM-AT": (92.44, 67.31),
        },
    }
    both = {
        "3": [(65.76, 31.91), (66.08, 32.53), (73.65, 39.37)],
        "4": [(84.80, 57.09), (85.20, 57.62), (92.16, 67.75)],
    }
    for number in printed:
        table = load_table(number)
        rows = {row["method"]: (row["paper"].get("clean"), row["paper"].get("aa")) for row in table["rows"]}
        assert printed[number].items() <= rows.items()
        pairs = [(row["paper"].get("clean"), row["paper"].get("aa")) for row in table["rows"]]
        assert all(pair in pairs for pair in both[number])
        assert len({row["id"] for row in table["rows"]}) == len(table["rows"])
        for path in render(table, [], tmp_path):
            assert table["title"].split(":")[0] in path.read_text()


def test_a_sweeps_runs_stand_in_the_sweeps_table_alone(tmp_path: Path) -> None:
    """alpha = 12 belongs to Table X, not to Table III; a person's own gamma makes a section of its own."""
    experiment = "at/c100_basic_paper"
    made = [
        {**record(aa, overrides=(f"experiment={experiment}", *overrides)), "path": f"{aa}.json"}
        for aa, overrides in ((30.0, ()), (40.0, ("loss.alpha=12",)), (20.0, ("loss.gamma=0.9",)))
    ]  # fmt: skip
    titles = {}
    for number in ("3", "10"):
        built = sections(load_table(number), made)
        titles[number] = [(t.scale, t.setting) for t in built]
        rows = {
            row.id: row.ours["aa"] for t in built if t.scale == "smoke" and not t.setting for row in t.rows
        }
        wanted = {"gkl_basic_paper": [30.0]} if number == "3" else {"alpha3": [40.0], "alpha5": [30.0]}
        assert {k: v for k, v in rows.items() if v} == wanted
    assert titles["3"] == [("paper", ""), ("smoke", ""), ("smoke", "loss.gamma=0.9")]
    assert claims()[experiment].count({"loss.alpha": 12.0}) == 1


def test_rows_of_tables_name_runs_that_compose_and_differ() -> None:
    """Every row of every table and figure is a checked run, and rows that are one run say so in the configuration."""
    for kind in ("table", "figure"):
        for number in tables(kind):
            table = load_table(number, kind)
            plan = cells(table, scale="smoke", protocol="official", seeds=[0])
            for cell in plan:
                check(cell.config, 1)
            distinct = {
                (name, str(row.get("overrides")))
                for row in table["rows"]
                for name in experiments(table, row).values()
            }
            ids = {row["id"] for row in table["rows"]}
            shown = [cell for cell in plan if cell.row in ids]  # and not what must be done before
            assert len(shown) == len(distinct), number
    shared = {c.record for n in ("10", "11", "12", "20") for c in cells(load_table(n), scale="smoke", protocol="official")
              if c.config["loss"].get("alpha") == 20.0 and c.config["loss"].get("beta") == 5.0
              and c.config["loss"]["gamma"] == 0.4 and c.config["loss"]["weights"] == "class"}  # fmt: skip
    assert len(shared) == 1  # the centre of four tables is one run


def test_the_rate_is_what_recorded_runs_sustained_and_says_how_far_it_errs() -> None:
    """Runs of 1, 2 and 4 times the seconds: the middle one's rate, the others a factor 2 away; other machines and scales aside."""
    made = [record(30.0, seed, cost={"seconds": 100.0 * 2**seed}) for seed in range(3)]
    flops = needed_flops(made[0]["config"], recorded_size(made[0]))
    assert recorded_size(made[0]) == (1437, 360, 8, 10)
    others = [record(30.0, scale="small", cost={"seconds": 1.0}),
              record(30.0, hardware={"name": "another", "count": 1}, cost={"seconds": 1.0})]  # fmt: skip
    rate = measured_rate([*made, *others], "a processor", "smoke", "at")
    assert rate is not None and rate.runs == 3 and rate.factor == pytest.approx(2.0)
    assert rate.tflops == pytest.approx(flops / 200e12)
    assert "the median of 3 recorded runs (at, scale smoke) on a processor" in str(rate)
    cell = Cell("gkl", config("seed=999"))  # which nobody has run
    assert device_hours(cell, rate) == pytest.approx(200 / 3600)
    assert measured_rate(made[:2], "a processor", "smoke", "at") is None
    assert "an assumption" in summary("Table", "smoke", [cell])
    assert str(rate) in summary("Table", "smoke", [cell], rate)


def test_a_network_that_cannot_be_counted_stops_no_plan(tmp_path: Path) -> None:
    """A person's own, of which a record does not say where its file is kept, or whose code makes nothing without numbers."""
    own = record(30.0, 3, cost={"seconds": 1.0})
    own["config"] = own["config"] | {"model": {"_target_": "model/own", "name": "Net@0123456789abcdef"}}
    made = [record(30.0, seed, cost={"seconds": 100.0 * 2**seed}) for seed in range(3)]
    counted, all_of_them = (
        measured_rate(some, "a processor", "smoke", "at") for some in (made, [*made, own])
    )
    assert counted == all_of_them != None  # noqa: E711
    with pytest.raises(Uncounted):
        needed_flops(own["config"], recorded_size(own))
    (tmp_path / "net.py").write_text(
        "from torch import nn, zeros\nclass Net(nn.Linear):\n    def __init__(self, num_classes):\n"
        "        super().__init__(3, int(zeros(1).item()) + num_classes)\n"
    )
    cell = Cell("own", config(f"model={tmp_path}/net.py:Net", f"paths.outputs={tmp_path}"))
    (tmp_path / "w.pt").write_bytes(b"not read")
    begun = Cell("begun", config("model=wrn_10_1", "seed=999", f"model.checkpoint={tmp_path}/w.pt"))
    assert device_hours(begun) == device_hours(Cell("gkl", config("model=wrn_10_1", "seed=999")))
    line = summary("Table", "smoke", [cell])
    assert "an unknown number of device-hours for this data or network" in line and "GB on disk" not in line


def test_paired_comparison_is_students() -> None:
    """Two rows over the seeds that both have; textbook numbers for differences 1, 2, 3: 2 ± 4.303 / sqrt(3)."""
    table = {
        **TABLE, "compare": [["gkl", "kl"]],
        "rows": [TABLE["rows"][1], {"id": "kl", "method": "KL", "experiment": "at/c100_basic_kl", "paper": {}}],
    }  # fmt: skip
    runs = [record(30.0 + s, s) for s in (1, 2, 3, 9)]
    runs += [record(30.0, s, overrides=("experiment=at/c100_basic_kl",)) for s in (1, 2, 3)]
    runs = [{**r, "path": "p"} for r in runs]
    built = build(table, runs, scale="smoke", protocol="official", claims={})
    (line,) = comparison_lines(built.comparisons)
    assert line.startswith("GKL_AT minus KL, paired over 3 seeds") and "AA +2.00 ± 2.48 points" in line
    assert paired_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302652729911275 / 3**0.5)
    alone = build(table, runs[:1] + runs[4:5], scale="smoke", protocol="official", claims={})
    assert alone.comparisons == []  # one seed has no interval


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_lists_each_run_once_and_knows_what_is_done(tmp_path: Path) -> None:
    table = load_table("3")
    folders = [f"paths.results={tmp_path}", f"paths.outputs={tmp_path}"]
    plan = cells(
        table, scale="smoke", protocol="official", seeds=[0, 1], rows=["gkl_basic"], overrides=folders
    )
    assert [(c.row, c.config["seed"], c.status) for c in plan] == [
        ("gkl_basic", 0, "missing"),
        ("gkl_basic", 1, "missing"),
    ]
    write_record(tmp_path / "runs", record(30.0))
    assert [c.status for c in plan] == ["done", "missing"]
    text = summary(table["title"], "smoke", plan)
    assert "1 of 2 runs done" in text and "done: seed 0, missing: seed 1" in text
    for cell in cells(table, scale="paper", protocol="official"):
        check(cell.config, 1)
    assert config_hash(usual(plan[0].config)) == record(30.0)["config_hash"]


@pytest.mark.parametrize("word", ["seed=1", "+seed=1", "experiment=at/c10_basic_kl"])
def test_a_seed_or_experiment_for_all_runs_is_refused(word: str) -> None:
    """The seed was passed over, and the row's place given to another experiment's run."""
    with pytest.raises(ConfigError, match=r"would stand for every run of table03; choose by (seeds|rows)="):
        cells(load_table("3"), scale="smoke", protocol="official", rows=["gkl_basic"], overrides=[word])


def test_costs_are_counted() -> None:
    """WRN-34-10: 5.24 GMAC a 32x32 image (the sum over its convolutions), hours from 23 forwards a sample and AWP."""
    base = compose("train", ["experiment=at/c100_basic_gkl"])
    flops = forward_flops(base["model"], 32, 100)
    widths, macs = [(16, 160, 32), (160, 320, 16), (320, 640, 8)], 9 * 3 * 16 * 32**2
    for came, width, side in widths:
        macs += (9 * came * width + 9 * width * width + came * width + 8 * 9 * width * width) * side**2
    assert abs(flops / 2 - macs - 640 * 100) < 1e-3 * macs
    hours = device_hours(Cell("gkl", base))
    with_awp, without = 191, 9
    forwards = 50_000 * (with_awp * 23 + without * 17) + 200 * 10_000 + 10_000 * 0.35 * 9755
    assert hours is not None and abs(hours - forwards * flops / 1e13 / 3600) < 0.01 * hours
    assert 1.5e9 < disk_bytes(base) < 3e9
    pictures = compose("train", ["experiment=at/c100_basic_gkl", "data=image_folder", "data.root=x"])
    assert device_hours(Cell("gkl", pictures)) is None
    assert device_hours(Cell("gkl", base), Rate(20.0)) == pytest.approx(hours / 2)
