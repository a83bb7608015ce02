"""Figures that are kept: drawn again when a number, the code, matplotlib or the file has changed, and only then."""

import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from gkl.data.label_pictures import as_png, colour
from trainers.reports import figures
from trainers.reports.charts import questions, segmentations
from trainers.reports.figures import FORMATS, is_sealed, sealed, write
from trainers.reports.gradient_paths import norms
from trainers.reports.render import render_figure
from trainers.reports.tables import Row, Table
from trainers.runs.plan import load_table


def swept(last: float = 51.0) -> Table:
    """A sweep over three values; last: what the third one reached."""
    reached = {"0.2": 50.0, "0.4": 52.0, "0.6": last}
    record = {"seed": 0, "scale": "smoke", "assessments": {}}
    rows = [
        Row(name, ["GKL-AT", name], {"aa": 31.0}, {"aa": [aa]}, "stand-in: digits", False, None, [record])
        for name, aa in reached.items()
    ]
    return Table("A sweep", "smoke", "official", "", ["method", "γ"], {"aa": "AA"}, rows)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The figures that were drawn, by name; a line stands for each, since a real one takes a second."""
    names: list[str] = []

    def noted(name: str, table: Table) -> Figure:
        names.append(name)
        figure = Figure(figsize=(1, 1))
        figure.add_artist(Line2D([0, 1], [0, table.rows[-1].ours["aa"][0] / 100]))
        return figure

    monkeypatch.setattr(figures, "draw", noted)
    return names


def test_what_has_not_changed_is_left(tmp_path: Path, drawn: list[str]) -> None:
    paths = write("ablation", swept(), tmp_path / "sweep-0.4")
    assert [path.name for path in paths] == [
        "sweep-0.4.png",
        "sweep-0.4.pdf",
    ]  # a dot in the name is no suffix
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert write("ablation", swept(), tmp_path / "sweep-0.4") == paths
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before
    assert drawn == ["ablation"]
    again = write("ablation", swept(), tmp_path / "elsewhere")  # and the same records give the same bytes
    assert [path.read_bytes() for path in again] == [content for content, _ in before]


def other_code(patch: pytest.MonkeyPatch) -> None:
    code = figures._code()
    patch.setattr(figures, "_code", lambda: code + "# another line\n")


def other_matplotlib(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(figures, "version", lambda name: "0.0")


@pytest.mark.parametrize("change", [other_code, other_matplotlib])
def test_other_code_draws_again(
    change: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    drawn: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("ablation", swept(), tmp_path / "sweep")
    change(monkeypatch)
    for _ in range(2):
        write("ablation", swept(), tmp_path / "sweep")
    assert len(drawn) == 2


def test_a_changed_number_is_drawn_again(tmp_path: Path, drawn: list[str]) -> None:
    paths = write("ablation", swept(), tmp_path / "sweep")
    before = [path.read_bytes() for path in paths]
    for _ in range(2):
        write("ablation", swept(51.5), tmp_path / "sweep")
    assert len(drawn) == 2
    assert all(path.read_bytes() != content for path, content in zip(paths, before, strict=True))
    table = swept()
    rows = [dataclasses.replace(row, records=[{**row.records[0], "seed": 1}]) for row in table.rows]
    write("ablation", dataclasses.replace(table, rows=rows), tmp_path / "sweep")  # of another record
    assert len(drawn) == 3


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_drawn_again(kind: str, tmp_path: Path, drawn: list[str]) -> None:
    """A byte that differs anywhere, the digest's own included; one that is missing; a file cut short, empty or gone."""
    path = dict(zip(FORMATS, write("ablation", swept(), tmp_path / "sweep"), strict=True))[kind]
    whole = path.read_bytes()
    lot = random.Random(0)
    mark = re.search(rb"[0-9a-f]{64}", whole)
    assert mark
    places = [0, len(whole) - 1, mark.start(), mark.start() - 1, *lot.sample(range(len(whole)), 200)]
    key = figures._key("ablation", swept())
    assert is_sealed(whole, key, kind)
    for place in places:
        assert not is_sealed(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], key, kind)
        assert not is_sealed(whole[:place] + whole[place + 1 :], key, kind)
    for number, damaged in enumerate((whole[: len(whole) // 2], whole[:-1], b"", whole + b"\n"), 2):
        path.write_bytes(damaged)
        write("ablation", swept(), tmp_path / "sweep")
        assert path.read_bytes() == whole and len(drawn) == number
    path.unlink()
    write("ablation", swept(), tmp_path / "sweep")
    assert path.read_bytes() == whole


def test_a_sealed_file_is_still_what_it_was(tmp_path: Path) -> None:
    """The PNG shows the same and says the digest as text; the PDF's table of contents is where the file says."""
    png, pdf = write("ablation", swept(), tmp_path / "sweep")
    figure = figures.draw("ablation", swept())
    assert figure is not None
    plain = {kind: tmp_path / f"plain.{kind}" for kind in FORMATS}
    for kind, path in plain.items():
        figures.save(figure, path, kind)
    key = figures._key("ablation", swept())
    assert [png.read_bytes(), pdf.read_bytes()] == [sealed(p.read_bytes(), key, k) for k, p in plain.items()]
    with Image.open(png) as image, Image.open(plain["png"]) as unsealed:
        assert image.tobytes() == unsealed.tobytes()
        assert re.fullmatch(r"[0-9a-f]{64}", image.text["Digest"])  # type: ignore[attr-defined]
    with Image.open(png) as image:
        image.verify()  # every chunk's checksum
    content = pdf.read_bytes()
    start = re.search(rb"startxref\n(\d+)\n%%EOF\n$", content)
    assert start and content[int(start[1]) :].startswith(b"xref\n")


def test_a_table_without_what_a_figure_shows_is_not_drawn(tmp_path: Path, drawn: list[str]) -> None:
    """Without records, or without what an assessment measured."""
    empty = dataclasses.replace(swept(), rows=[dataclasses.replace(r, records=[]) for r in swept().rows])
    assert write("ablation", empty, tmp_path / "none") == write("structure", swept(), tmp_path / "none") == []
    assert drawn == [] and list(tmp_path.iterdir()) == []


def test_the_code_of_a_figure_is_all_that_draws_it() -> None:
    code = figures._code()
    for function in (
        "write",
        "save",
        "provenance",
        "clean_against_aa",
        "structure",
        "class_scores",
        "ablation",
        "segmentations",
        "questions",
        "shown_pictures",
    ):
        assert f"\ndef {function}(" in code, function


def test_segmentations_are_shown_side_by_side(tmp_path: Path) -> None:
    """Pictures of the lowest seed of each row that has any; their first pixels are what the record says."""
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    labels[4:] = 255
    shown = {
        "picture": as_png(torch.full((3, 8, 8), 77, dtype=torch.uint8)), "truth": as_png(labels), "predicted": as_png(labels + 1)
    }  # fmt: skip
    table = swept()
    rows = [
        dataclasses.replace(
            row, records=[{**r, "evaluation": {"shown": [shown, shown]} if n else {}} for r in row.records]
        )
        for n, row in enumerate(table.rows)
    ]
    table = dataclasses.replace(table, rows=rows)
    figure = figures.draw("segmentations", table)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.images]
    with_records = sum(bool(row.records) for row in rows[1:])
    assert len(panels) == 2 * (2 + with_records)
    pixels = [axes.images[0].get_array()[0, 0].tolist() for axes in panels[:3]]
    assert pixels == [[77, 77, 77], [*colour(0)], [*colour(1)]]
    assert panels[1].images[0].get_array()[7, 7].tolist() == [255, 255, 255]
    chart = segmentations(table)[0]
    values = chart["data"]["values"]
    assert len(values) == len(panels) and all(v["url"].startswith("data:image/png;base64,") for v in values)
    assert figures.draw("segmentations", swept()) is None and segmentations(swept()) == []
    assert len({colour(n) for n in range(256)}) == 256


def test_questions_stand_beside_every_row_s_answers() -> None:
    picture = as_png(torch.full((3, 8, 8), 77, dtype=torch.uint8))
    table = swept()
    rows = [
        dataclasses.replace(
            row,
            records=[
                {**r, "evaluation": {"shown": [{"benchmark": "gqa", "question": f"which?{k}", "answer": f"{n}.{k}", "picture": picture} for k in range(2)]}}
                for r in row.records
            ],
        )
        for n, row in enumerate(table.rows)
    ]  # fmt: skip
    table = dataclasses.replace(table, rows=rows)
    figure = figures.draw("questions", table)
    assert figure is not None
    assert sum(bool(axes.images) for axes in figure.axes) == 2
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    values = questions(table)[0]["data"]["values"]
    for n, row in enumerate(rows):
        for k in range(2):
            shown = bool(row.records)
            assert any(f"{n}.{k}" in text for text in words) == shown
            assert any(v["text"] == f"{n}.{k}" and v["row"] == k for v in values) == shown
    assert figures.draw("questions", swept()) is None and questions(swept()) == []


def test_figure_2_shows_gradients_that_are_measured(tmp_path: Path) -> None:
    """Theorem 1: KL's to the teacher are DKL's wMSE's, KL's to the student its cross-entropy's; GKL's wMSE reaches both alike (Eq. 13)."""
    found = norms()
    assert found["DKL"]["wMSE"]["teacher"] == pytest.approx(found["KL"]["KL"]["teacher"], rel=1e-12)
    assert found["DKL"]["CE"]["student"] == pytest.approx(found["KL"]["KL"]["student"], rel=1e-12)
    assert (
        found["DKL"]["wMSE"]["student"] == found["DKL"]["CE"]["teacher"] == found["GKL"]["CE"]["teacher"] == 0
    )
    assert found["GKL"]["wMSE"]["student"] == pytest.approx(found["GKL"]["wMSE"]["teacher"], rel=1e-12) and (
        found["GKL"]["wMSE"]["student"] > 0
    )
    written = render_figure(load_table("2", "figure"), [], tmp_path)
    assert [path.name for path in written] == ["figure2-paper.png", "figure2-paper.pdf"]
