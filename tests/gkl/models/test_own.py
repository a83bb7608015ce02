"""A person's own network: from a file that was named, or an installed package; what it may be made of, and what it must return."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gkl.attacks import awp
from gkl.models import create
from gkl.models.own import OwnNetwork, check_answers, own
from gkl.own import installed, keep, named

NET = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.frozen = nn.Conv2d(3, width, 3, padding=1).requires_grad_(False)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.spare = nn.Linear(5, 5)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(self.frozen(x)).relu().mean((2, 3)))

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Auxiliary(Net):
    def forward(self, x):
        return [super().forward(x)] * 2 if self.training else super().forward(x)

class Maps(Net):
    def forward(self, x):
        return self.frozen(x)

class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.4).div_(0.2))

class Clamped(Net):
    def forward(self, x):
        x.data.clamp_(0.1, 0.9)
        return super().forward(x)

class Squeezed(Net):
    def forward(self, x):
        return super().forward(x).squeeze()

class Fixed(Net):
    def forward(self, x):
        assert x.shape[-1] == 224, "wants 224"
        return super().forward(x)

class Dropping(Net):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x))

class AlwaysTraining(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.norm = nn.BatchNorm2d(3)

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return super().forward(self.norm(x))

class Probabilities(Net):
    def forward(self, x):
        return super().forward(x).softmax(-1)

class Lazy(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.fc = nn.LazyLinear(num_classes)

class Grey(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.frozen = nn.Conv2d(1, 4, 3, padding=1)

class Complex(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.turned = nn.Parameter(torch.randn(3, 1, 1, dtype=torch.complex64))

    def forward(self, x):
        return super().forward((self.turned * x).abs())

class Blind(Net):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(self.frozen(x)).relu().mean((2, 3))
        return self.fc(x)

class Saving(Net):
    reentrant = False

    def forward(self, x):
        features = lambda x: self.conv(self.frozen(x)).relu().mean((2, 3))
        return self.fc(checkpoint(features, x, use_reentrant=self.reentrant))

class Reentrant(Saving):
    reentrant = True

class SavingNorm(Saving):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.conv = nn.Sequential(self.conv, nn.BatchNorm2d(4))

def wide(num_classes, **options):
    return Net(num_classes, width=8)

def nothing(num_classes):
    return "a string"

def no_classes():
    return Net(10)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    keep(tmp_path / "net.py", tmp_path / "kept")
    return tmp_path / "net.py"


def made(net: Path, name: str, **options: object) -> OwnNetwork:
    return own(named(net, name), 7, str(net.parent / "kept"), **options)  # type: ignore[arg-type]


def test_a_class_and_a_function_make_a_network(net: Path) -> None:
    x = torch.rand(2, 3, 8, 8)
    for name in ("Net", "wide", "Complex"):
        model = made(net, name)
        check_answers(model, 8)
        assert model(x).shape == (2, 7) and torch.equal(model.forward_taps(x).logits, model(x))
    assert made(net, "Net", options={"width": 16}).model.conv.out_channels == 16
    normalised = made(net, "Net", normalisation="cifar10")
    plain = OwnNetwork(normalised.model, 7)
    assert torch.equal(normalised(x), plain(normalised.normalise(x)))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Pair", "Pair returns a tuple; a network returns its logits alone"),
        ("Auxiliary", "Auxiliary returns a list; a network returns its logits alone"),
        ("Maps", r"Maps returns shape \(4, 4, 8, 8\); a network returns its logits alone"),
        ("InPlace", "InPlace changes the pictures that it is given; leave out what works in place"),
        ("Clamped", "Clamped changes the pictures that it is given"),  # though none of middling shade
        ("Squeezed", r"Squeezed returns shape \(7,\); a network returns its logits alone, \(1, 7\) here"),
        (
            "Dropping",
            "Dropping draws at random in eval mode.*; F.dropout needs training=self.training",
        ),
        ("AlwaysTraining", "AlwaysTraining answers a picture alone otherwise than in a batch"),
        (
            "Probabilities",
            "Probabilities returns probabilities; a network returns its logits: leave out the softmax",
        ),
        ("Lazy", "Lazy has no weights yet for fc.weight and others; give lazy layers their sizes"),
        (
            "Grey",
            r"Grey cannot take pictures .*; pictures are RGB, .* makes them grey itself: x.mean\(1, keepdim=True\)",
        ),
        ("Fixed", r"Fixed cannot take pictures of 8x8 \(wants 224\); choose data.image_size"),
    ],
)
def test_what_is_no_classifier_of_these_pictures_is_one_line(net: Path, name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        check_answers(made(net, name), 8)
    assert "\n" not in str(caught.value)


def test_what_a_network_returns_in_training_is_no_business_of_an_evaluation(net: Path) -> None:
    check_answers(made(net, "Auxiliary"), 8, evaluated=True)
    with pytest.raises(ValueError, match="Pair returns a tuple"):
        check_answers(made(net, "Pair"), 8, evaluated=True)


def test_an_attack_needs_a_gradient_to_the_pictures(net: Path) -> None:
    """Which a head on a fixed trunk has not, and distillation does not ask for."""
    check_answers(made(net, "Blind"), 8)
    check_answers(made(net, "Net"), 8, attacked=True)
    with pytest.raises(ValueError, match="Blind has no gradient to its pictures, which the attack climbs"):
        check_answers(made(net, "Blind"), 8, attacked=True)


def test_activation_checkpoints_are_for_networks_that_may_be_computed_twice(net: Path) -> None:
    before = sys.getprofile()
    check_answers(made(net, "Saving"), 8, attacked=True, trained=True)
    check_answers(made(net, "SavingNorm"), 8, attacked=True)  # an evaluation
    with pytest.raises(
        ValueError, match="SavingNorm computes .* anew in the backward .*batch norm would.*more dev"
    ):
        check_answers(made(net, "SavingNorm"), 8, trained=True)
    with pytest.raises(
        ValueError, match="Reentrant .*use_reentrant=True, which loses grad.*; set use_reentrant=F"
    ):
        check_answers(made(net, "Reentrant"), 8, trained=True)
    assert sys.getprofile() is before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "nothing gives a str, which is no nn.Module"),
        ("no_classes", "no_classes cannot be made with num_classes=7"),
        ("absent", "no class or function 'absent'; name it as model=FILE.py:NAME"),
    ],
)
def test_what_makes_no_network_is_one_line(net: Path, name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        made(net, name)


def test_trying_a_network_leaves_it_and_the_generator_alone() -> None:
    model = create("resnet10t", 10).train()
    model.model.drop_rate = 0.5  # type: ignore[union-attr]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    check_answers(model, 32)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_timm_s_network_of_one_size_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"doesn't match model .224.\); .* model.timm_options=.img_size:32."):
        check_answers(create("vit_tiny_patch16_224", 10), 32)
    check_answers(create("vit_tiny_patch16_224", 10, timm_options={"img_size": 32}), 32)


def test_a_file_runs_from_where_it_was_kept_alone(tmp_path: Path) -> None:
    """Another's name of a network, as a record or a frozen configuration has it, runs nothing here."""
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{NET}")
    name = named(tmp_path / "net.py", "Net")
    with pytest.raises(
        ValueError, match="no network Net@.* is kept in .*; name it on the command line, model=FILE.py:Net"
    ):
        own(name, 7, str(tmp_path / "kept"))
    assert not (tmp_path / "ran").exists()
    keep(tmp_path / "net.py", tmp_path / "kept")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "net.py").unlink()
    own(name, 7, str(tmp_path / "kept"))
    assert (tmp_path / "ran").exists()


def test_a_kept_file_that_was_changed_is_refused(net: Path) -> None:
    name = named(net, "Net")
    kept = next((net.parent / "kept").iterdir())
    kept.write_text("import os")
    with pytest.raises(ValueError, match="the kept network .* was changed"):
        own(name, 7, str(net.parent / "kept"))


def test_a_file_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import layers_beside_it")
    keep(tmp_path / "net.py", tmp_path)
    with pytest.raises(
        ValueError, match="No module named 'layers_beside_it'; a network of several files is a package"
    ):
        own(named(tmp_path / "net.py", "Net"), 7, str(tmp_path))
    with pytest.raises(ValueError, match="no network's file .*none.py .No such file"):
        named(tmp_path / "none.py", "Net")


@pytest.mark.parametrize("where", ["", "        "])
def test_a_file_beside_it_is_refused_though_it_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """By PYTHONPATH it once could, and a run was known without it: changed, it was "done" with the old one's numbers."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "layers_beside.py").write_text("width = 4")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    line = f"{where}import layers_beside, timm, PIL.Image\n"
    text = (
        f"{line}{NET}"
        if not where
        else NET.replace("        super().__init__()\n", f"        super().__init__()\n{line}", 1)
    )
    (tmp_path / "net.py").write_text(text)
    keep(tmp_path / "net.py", tmp_path)
    for _ in range(2):  # a second network of the file likewise
        with pytest.raises(
            ValueError, match="Net imports .*layers_beside.py, and a run would not be known by"
        ):
            own(named(tmp_path / "net.py", "Net"), 7, str(tmp_path))


def test_a_package_s_network_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name holds the package's content, not its version."""
    package, info = tmp_path / "site" / "their_nets", tmp_path / "site" / "their_nets-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(NET)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gkl.models]\ntheir_net = their_nets.nets:Net\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert installed("no_such_net") is None
    name = installed("their_net")
    assert name is not None and "their_nets" not in sys.modules  # its name alone runs nothing
    assert own(name, 7, str(tmp_path)).num_classes == 7
    (package / "nets.py").write_text(NET + "\n# changed")
    assert installed("their_net") != name
    with pytest.raises(ValueError, match="the package of their_net has changed since"):
        own(name, 7, str(tmp_path))
    name = installed("their_net")
    for hidden in (".DS_Store", "__pycache__/nets.cpython-311.pyc", ".ipynb_checkpoints/nets.py"):
        (package / hidden).parent.mkdir(exist_ok=True)
        (package / hidden).write_bytes(b"1")
    assert installed("their_net") == name
    (package / "width.json").write_text("4")  # which its code may read
    assert installed("their_net") != name


def test_a_package_s_network_reads_what_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "site" / "reading_nets", tmp_path / "site" / "reading_nets-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("from pathlib import Path\nfrom torch import nn\n" + READING)
    (package / "width.txt").write_text("4")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reading-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gkl.models]\nreading = reading_nets:Reading\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    name = installed("reading")
    assert name is not None
    assert own(name, 7, str(tmp_path)).num_classes == 7


@pytest.mark.parametrize("when", ["making", "importing"])
def test_a_file_s_network_reads_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A run would not be known by it: with another width.txt it would be done already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "width.txt").write_text("4")
    reading = READING.replace("Path(__file__).with_name('width.txt')", "Path('width.txt')")
    if when == "importing":
        line = "width = int(Path('width.txt').read_text())\n"
        reading = line + reading.replace(f"        {line}", "")
    (tmp_path / "net.py").write_text(f"from pathlib import Path\nfrom torch import nn\n{reading}")
    keep(tmp_path / "net.py", tmp_path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="the network Reading reads width.txt, .* as model.options="
        ) as told:
            own(named(tmp_path / "net.py", "Reading"), 7, str(tmp_path))
        assert "\n" not in str(told.value)


READING = """
class Reading(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        width = int(Path(__file__).with_name('width.txt').read_text())
        self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def test_weights_are_perturbed_that_are_trained_and_used(net: Path) -> None:
    model = made(net, "Net").model
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.rand(2, 3, 8, 8)
    with awp.perturbed(model, lambda: nn.functional.cross_entropy(model(x), torch.tensor([0, 1])), 0.1):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"conv.weight", "fc.weight"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
