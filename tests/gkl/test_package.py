"""What `pip install .` gives: a package that needs torch alone, and says what else to install where more is needed."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

import gkl
from gkl import ClassPrior, GKLLoss, gkl_loss

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torchvision", "timm", "hydra", "omegaconf", "wandb", "sklearn", "scipy", "pyautoattack")


def python(program: str, *options: str, path: Path | None = None) -> str:
    """What a child prints; with a path, its sys.path is the standard library and that folder."""
    if path is not None:
        program = f"import sys; sys.path.append({str(path)!r})\n{program}"
        options = ("-I", "-S", *options)
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def required(name: str, extras: frozenset[str] = frozenset()) -> Iterator[str]:
    """A distribution and all that its metadata requires here."""
    yield name
    for requirement in map(Requirement, distribution(name).requires or []):
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            yield from required(requirement.name, frozenset(requirement.extras))


@pytest.fixture(scope="session")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what torch requires, linked from this environment, and gkl from its wheel; nothing else."""
    folder, source = (tmp_path_factory.mktemp(name) for name in ("alone", "source"))
    for name in set(required("torch")):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            pytest.skip(f"{name}, which torch requires, is not installed")
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    for part in ("gkl", "trainers"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = source / "wheels"
    for command in (
        ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, source],
        ["install", "--no-deps", "--no-index", "--find-links", wheels, "--target", folder, "gkl"],
    ):
        subprocess.run([*pip, *command], check=True)
    return folder


LOOP = """
import torch
import torch.nn.functional as F
from gkl.losses.closed_form import gkl_loss
from gkl.losses.prior import ClassPrior
torch.manual_seed(0)
model, prior = torch.nn.Linear(8, 5), ClassPrior(5)
y = torch.arange(64) % 5
x = torch.randn(64, 8) + 2 * torch.eye(8)[y]
optimizer, errors = torch.optim.SGD(model.parameters(), lr=0.1), []
for epoch in range(8):
    clean, moved = model(x), model(x + 0.1 * torch.randn_like(x))
    errors.append(F.cross_entropy(clean, y))
    loss = errors[-1] + gkl_loss(moved, clean, prior[y], alpha=20.0, beta=4.0, gamma=0.4)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    prior.update(clean.detach(), y)
    prior.renew()
assert errors[-1] < 0.9 * errors[0] and (prior.probs.diagonal() > 0.2).all(), errors
from importlib.metadata import distributions
print(*sorted({d.name for d in distributions()}))
"""


def test_the_wheel_trains_beside_torch_alone(torch_alone: Path) -> None:
    there = python(LOOP, path=torch_alone).split()
    assert (
        "gkl" in there and "torch" in there and not {"numpy", "timm", "torchvision", "hydra-core"} & {*there}
    )
    assert (torch_alone / "gkl/py.typed").exists() and not (torch_alone / "trainers").exists()


def test_the_command_says_what_is_installed(torch_alone: Path) -> None:
    program = (
        "from importlib.metadata import entry_points\n"
        "(command,) = entry_points(group='console_scripts', name='gkl')\ncommand.load()()"
    )
    said = python(program, path=torch_alone)
    assert f"gkl {PROJECT['version']}, torch {torch.__version__}" in said and "GPU: " in said
    assert "evaluation: pip install 'gkl[evaluation]' brings pyautoattack, numpy" in said
    assert "models" in said and "hydra-core" in said.split("reproduction: ")[1].splitlines()[0]


def test_what_is_missing_is_one_line_with_its_extra(torch_alone: Path) -> None:
    program = """
for module in ("models", "distillation", "evaluation"):
    try:
        __import__(f"gkl.{module}")
    except ModuleNotFoundError as error:
        print(error)
"""
    models = "gkl.models needs safetensors, timm, torchvision: pip install 'gkl[models]'"
    evaluation = "gkl.evaluation needs PIL, numpy, pyautoattack: pip install 'gkl[evaluation]'"
    assert python(program, path=torch_alone).splitlines() == [models, models, evaluation]


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        file.read_text()
    )
    for file in (ROOT / "gkl").rglob("*.py")
}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """What statements import, by its dotted name."""
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {*names, *(str(node.module) for node in nodes if isinstance(node, ast.ImportFrom))}


def beyond(names: set[str]) -> set[str]:
    """The packages among them that torch does not bring."""
    return {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "gkl", "torch", "triton"}


def reached(module: str, seen: set[str]) -> set[str]:
    """What a module imports anywhere in it, and what those of gkl that it imports do."""
    names = imported([*ast.walk(MODULES[module])])
    for other in {*names & MODULES.keys()} - seen:
        names |= reached(other, seen | {*names})
    return names


def test_every_import_beyond_torch_has_its_extra() -> None:
    """Named by the module or by the package it lies in: no import is left out, and none is named that is not reached."""
    there: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        home = next((name for name in gkl.NEEDS if f"{module}.".startswith(f"{name}.")), module)
        packages = {*gkl.NEEDS.get(home, ("", ()))[1]}
        assert beyond(imported(tree.body)) <= packages, module
        there.setdefault(home, set()).update(beyond(reached(module, {module})))
    distributions = packages_distributions()
    for module, (extra, packages) in gkl.NEEDS.items():
        assert {*packages} <= there[module] and list(packages) == sorted(packages), module
        brought = {Requirement(line).name.lower() for line in PROJECT["optional-dependencies"][extra]}
        for package in packages:
            assert {name.lower() for name in distributions[package]} & brought, (module, package)


def test_the_library_imports_none_of_the_heavy_packages() -> None:
    program = """
import sys, gkl
print("torch" in sys.modules)
import gkl.losses.closed_form, gkl.losses.prior, gkl.losses.modules, gkl.attacks.pgd, gkl.losses.objectives
print(*{name.split(".")[0] for name in sys.modules})
"""
    at_first, there = python(program).splitlines()
    assert at_first == "False", "import gkl takes no time beyond torch's own"
    assert "torch" in there.split() and not {*HEAVY} & {*there.split()}


def test_public_names_do_not_hide_the_package() -> None:
    space: dict[str, object] = {}
    exec(
        "from gkl import *\nimport gkl\nprior, same = gkl.losses.prior, gkl.losses.closed_form.gkl is gkl_loss",
        space,
    )
    assert (
        {*gkl.__all__} <= {*space}
        and space["same"]
        and gkl.losses.closed_form.gkl_loss.__name__ == "gkl_loss"
    )
    assert gkl.__version__ == PROJECT["version"] and {*gkl.__all__} <= {*dir(gkl)}
    with pytest.raises(AttributeError, match="'gkl' has no attribute 'nothing'"):
        gkl.nothing  # noqa: B018


def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(epoch)
    for _ in range(3):
        x = torch.randn(32, 8, generator=draw)
        yield x, x + 0.1 * torch.randn(32, 8, generator=draw), torch.randint(5, (32,), generator=draw)


def trained(form: str) -> tuple[list[torch.Tensor], ClassPrior]:
    """The weights after each of two epochs, by the README's loop or by the module; and the prior."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 5).double()
    weights = {"alpha": 20.0, "beta": 4.0, "gamma": 0.4, "temperature": 2.0}
    criterion = GKLLoss(5, **weights, prior_temperature=1.5).double()
    prior = criterion.prior if form == "module" else ClassPrior(5, 1.5).double()
    optimizer, after = torch.optim.SGD(model.parameters(), lr=0.1), []
    for epoch in range(2):
        for x, moved, y in batches(epoch):
            teacher, student = model(x.double()), model(moved.double())
            if form == "module":
                loss = criterion(student, teacher, y)
            else:
                loss = gkl_loss(student, teacher, prior[y], **weights)
                prior.update(teacher.detach(), y)
            optimizer.zero_grad()
            (F.cross_entropy(teacher, y) + loss).backward()
            optimizer.step()
        (criterion if form == "module" else prior).renew()
        after.append(model.weight.detach().clone())
    return after, prior


def test_the_module_is_the_readmes_loop() -> None:
    (expected, prior), (found, same) = trained("loop"), trained("module")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(same.probs, prior.probs, rtol=1e-13, atol=0.0)
    assert prior.probs.std() > 0.01, "a uniform prior would tell nothing"


def test_the_module_in_eval_mode_leaves_its_prior_and_is_saved_with_it() -> None:
    x, y = torch.randn(16, 5), torch.arange(16) % 5
    criterion = GKLLoss(5, alpha=20.0, beta=4.0, gamma=0.4)
    criterion.eval()(x, x + 1, y)
    assert criterion.prior.counts.sum() == 0
    criterion.train()(x, x + 1, y)
    assert criterion.prior.counts.sum() == 16
    criterion.renew()
    again = GKLLoss(5, alpha=20.0, beta=4.0, gamma=0.4)
    again.load_state_dict(criterion.state_dict())
    assert again(x, 2 * x, y) == criterion(x, 2 * x, y) and "alpha=20.0" in repr(again)
