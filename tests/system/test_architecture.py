"""The house as docs/architecture.md describes it: imports one way, files and functions of a size that can be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text())
    for folder in ("gkl", "trainers", "scripts")
    for p in sorted((ROOT / folder).rglob("*.py"))
}
# Each may import those to its left alone; the first three of trainers are its common ground.
ROOMS = ("gkl", "trainers.errors", "trainers.signals", "trainers.files", "trainers.command", "trainers.loop",
         "trainers.methods", "trainers.runs", "trainers.reports", "scripts")  # fmt: skip


def room(module: str) -> int:
    """Where a module stands in ROOMS, -1 for another package's."""
    return next((n for n, name in enumerate(ROOMS) if module == name or module.startswith(f"{name}.")), -1)


def imported(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_imports_go_one_way() -> None:
    assert len(MODULES) > 100
    for module, tree in MODULES.items():
        for other in imported(tree):
            assert room(other) <= max(room(module), 0), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_and_its_functions_can_be_read(module: str) -> None:
    """Files of at most 300 lines, or a reason in their head; functions of at most 60 lines, GPU kernels and docstrings aside."""
    path = ROOT / (module.replace(".", "/") + ".py")
    tree = MODULES[module]
    if len(path.read_text().splitlines()) > 300:
        assert "One file, since" in (ast.get_docstring(tree) or ""), (
            f"{path} has over 300 lines and does not say why"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any(
            "triton.jit" in ast.unparse(d) for d in node.decorator_list
        ):
            text = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0  # type: ignore[operator]
            assert node.end_lineno - node.lineno + 1 - text <= 60, f"{module}.{node.name} has over 60 lines"  # type: ignore[operator]


def test_no_room_asks_what_kind_of_data_it_has() -> None:
    """One protocol for all: gkl.data.batches."""
    for module, tree in MODULES.items():
        if module.startswith("trainers."):
            calls = [
                ast.unparse(n)
                for n in ast.walk(tree)
                if isinstance(n, ast.Call) and ast.unparse(n.func) == "isinstance"
            ]
            assert not [
                c
                for c in calls
                if any(kind in c for kind in ("ImageData", "ImageFiles", "Views", "ResizedCrop"))
            ]
