"""The paper's figures from the same rows and records as its tables.

    figure = draw("clean_against_aa", table)        # table: trainers.reports.tables.build(...)
    save(figure, Path("figure1.pdf"), "pdf")
    write("clean_against_aa", table, Path("figure1"))       # both formats, drawn only where something has changed

matplotlib is loaded by the first that draws.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.files import write_atomically
from trainers.reports.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
FORMATS, DPI = ("png", "pdf"), 160
BLACK, BLUE, RED = "#000000", "#0072B2", "#D55E00"
ASSESSED = ("structure", "class_scores")  # figures of what an assessment of their name measured
MEASURED = ("gradient_paths",)  # drawn from what they measure themselves, without records
ENDS = {"png": b"\0\0\0\0IEND", "pdf": b"startxref"}  # what a seal stands before


def draw(name: str, table: Table) -> "Figure | None":
    """The figure of that name in DRAWINGS, or None where the table's rows have no records it could be drawn from."""
    import matplotlib

    from trainers.reports.drawings import DRAWINGS

    if name not in DRAWINGS:
        raise ValueError(f"figures are {', '.join(DRAWINGS)}, got {name!r}")
    with matplotlib.rc_context(STYLE):
        return DRAWINGS[name](table)


def save(figure: "Figure", path: Path | BytesIO, kind: str) -> None:
    """Write a figure as one of FORMATS. Drawn once, where matplotlib's savefig would draw it twice to the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    with matplotlib.rc_context(STYLE):
        if kind == "png":
            figure.dpi = DPI
            FigureCanvasAgg(figure).print_png(path)
        else:  # without its date: the same records give the same bytes
            FigureCanvasPdf(figure).print_pdf(path, metadata={"CreationDate": None})
        figure.set_layout_engine("none")  # laid out once: the next format finds everything in its place


def write(name: str, table: Table, stem: Path) -> list[Path]:
    """Write a figure in every format and return the paths, none where the table has nothing that the figure shows.

    What is there stays where its seal says that the same code has drawn it from the same table, and that it is whole.
    """
    records = [record for row in table.rows for record in row.records]
    if name not in MEASURED and not any(
        name not in ASSESSED or name in record["assessments"] for record in records
    ):
        return []
    key = _key(name, table)
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS}
    if not all(path.is_file() and is_sealed(path.read_bytes(), key, kind) for kind, path in paths.items()):
        figure = draw(name, table)
        if figure is None:
            return []
        for kind, path in paths.items():
            drawn = BytesIO()
            save(figure, drawn, kind)
            content = sealed(drawn.getvalue(), key, kind)
            write_atomically(path, partial(Path.write_bytes, data=content))
    return list(paths.values())


def _key(name: str, table: Table) -> str:
    """All that a figure's looks depend on: the table with its records, the code, matplotlib."""
    return json.dumps([name, table, _code(), version("matplotlib")], default=vars, sort_keys=True)


@cache
def _code() -> str:
    names = ("figures.py", "drawings.py", "ablation.py", "gradient_paths.py")
    return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)


def sealed(content: bytes, key: str, kind: str) -> bytes:
    """A file with the digest of key and content in it: a text chunk of a PNG, a comment of a PDF."""
    mark = hashlib.sha256(key.encode() + content).hexdigest()
    end = content.rindex(ENDS[kind])
    return content[:end] + _seal(mark, kind) + content[end:]


def is_sealed(content: bytes, key: str, kind: str) -> bool:
    """Whether a file is, to the last byte, what `sealed` made with that key."""
    end = content.rfind(ENDS[kind])
    start = end - len(_seal("0" * 64, kind))
    return start > 0 and content == sealed(content[:start] + content[end:], key, kind)


def _seal(mark: str, kind: str) -> bytes:
    if kind == "pdf":
        return f"%{mark}\n".encode()
    chunk = f"tEXtDigest\0{mark}".encode()
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def provenance(table: Table) -> str:
    """What ours stand for, from the status of the first row that has any."""
    status = next(row.status for row in table.rows if row.records)
    seeds = sorted({len({r["seed"] for r in row.records}) for row in table.rows if row.records})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = f"ours, scale {table.scale}, {count} seed{'s' if seeds[-1] > 1 else ''}\n{status}"
    return what + (f"\n{table.setting}" if table.setting else "")


def shown_pictures(row: Row) -> list[dict[str, str]]:
    """What a row's run of the lowest seed shows, as base64 of PNG; none where nothing is."""
    runs = sorted(
        (r for r in row.records if r.get("evaluation", {}).get("shown")), key=lambda r: int(r["seed"])
    )
    return list(runs[0]["evaluation"]["shown"]) if runs else []


def as_number(text: str) -> float | None:
    """A label as the number it is, None for another."""
    try:
        return float(text)
    except ValueError:
        return None


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of those points that no other surpasses in one coordinate without falling behind in the other."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }
