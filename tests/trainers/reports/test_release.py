"""The release pack: weights that timm loads back, a card with the record's numbers, RobustBench's entry where it would take it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from gkl.models import create
from gkl.models.timm_network import TimmNetwork
from tests.system.test_commands import Command, command  # noqa: F401  (a fixture)
from tests.trainers.runs.test_records_and_tables import record
from trainers.errors import RunError
from trainers.reports.release import not_for_robustbench, pack, upload
from trainers.runs.identity import config_hash

NETWORKS = {
    "wrn_10_1": {},
    "wrn_10_1_swish": {"normalisation": "cifar100"},
    "resnet_20": {},
    "vgg_8": {},
    "shufflenet_v1": {},
    "resnet18": {"normalisation": "imagenet"},
}


def finished(
    folder: Path, name: str, options: dict[str, Any], num_classes: int = 7, **change: Any
) -> tuple[Path, nn.Module]:
    """A record of a run and its weights on disk, as trainers.runs.run leaves them."""
    torch.manual_seed(0)
    model = create(name, num_classes=num_classes, **options)
    for module in model.modules():  # running statistics that are not the ones it is made with
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    weights = folder / "outputs" / "swa.pt"
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    made = record(31.0, **change)
    made["config"]["model"] = {"_target_": "model/create", "name": name, **options}
    made["config_hash"] = config_hash(made["config"])
    made["checkpoint"] = {"path": "swa.pt", "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    path = folder / "seed0.json"
    path.write_text(json.dumps(made))
    return path, model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_loads_it_back_to_the_same_logits(name: str, tmp_path: Path) -> None:
    path, model = finished(tmp_path, name, NETWORKS[name])
    folder = tmp_path / "release"
    files = {p.relative_to(folder).as_posix() for p in pack(path, tmp_path / "outputs", folder)}
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "record.json",
        "robustbench/NOT_WRITTEN.md",
    } == files
    assert (folder / "record.json").read_text() == path.read_text()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    seen = x
    if isinstance(model, TimmNetwork):  # timm's own networks take what config.json says
        config = loaded.pretrained_cfg
        mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
        seen = (x - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(loaded(seen), model(x))
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(model.state_dict())


def test_the_card_has_the_record_s_numbers_and_says_stand_in(tmp_path: Path) -> None:
    path, _ = finished(tmp_path, "wrn_10_1", {})
    pack(path, tmp_path / "outputs", tmp_path / "release")
    card = (tmp_path / "release/README.md").read_text()
    assert "| aa | 31.00 |" in card and "| clean | 60.00 |" in card
    assert "digits (a stand-in for cifar100: its numbers compare with no published ones)" in card
    assert "python scripts/train.py experiment=at/c100_basic_gkl scale=smoke seed=0" in card
    made = json.loads(path.read_text())
    assert f"configuration {made['config_hash']}" in card
    tag = json.loads((tmp_path / "release/config.json").read_text())["pretrained_cfg"]["tag"]
    assert tag == f"gkl_{made['config_hash']}_seed0"
    why = (tmp_path / "release/robustbench/NOT_WRITTEN.md").read_text()
    assert why == "RobustBench would not take this run: it takes cifar10 and cifar100, this is digits.\n"


def test_robustbench_gets_its_entry_for_what_it_would_take(tmp_path: Path) -> None:
    attacked = {"attack": "AutoAttack standard", "norm": "linf", "epsilon": 8 / 255, "n": 10_000}
    path, _ = finished(tmp_path, "wrn_10_1", {}, 100, scale="paper", evaluation=attacked)
    written = pack(path, tmp_path / "outputs", tmp_path / "release")
    (entry,) = [p for p in written if p.suffix == ".json" and "robustbench" in p.parts]
    assert entry.relative_to(tmp_path / "release/robustbench").as_posix() == (
        "cifar100/Linf/Reproduced2026Generalized_WRN-10-1.json"
    )
    content = json.loads(entry.read_text())
    assert (
        content["clean_acc"] == "60.00" and content["autoattack_acc"] == "31.00" and content["eps"] == "8/255"
    )
    issue = (tmp_path / "release/robustbench/issue.md").read_text()
    assert "31.00 % (10000 images)" in issue and entry.stem in issue
    for change, why in (({"n": 9_999}, "on 9999"), ({"epsilon": 0.031}, "0.031"), ({"attack": "screen"}, "standard"),
                        ({"norm": "l2"}, "ℓ∞")):  # fmt: skip
        assert why in str(
            not_for_robustbench({**json.loads(path.read_text()), "evaluation": {**attacked, **change}})
        )


def test_weights_that_are_not_the_record_s_are_refused(tmp_path: Path) -> None:
    path, _ = finished(tmp_path, "wrn_10_1", {})
    weights = tmp_path / "outputs/swa.pt"
    torch.save(create("wrn_10_1", num_classes=7).state_dict(), weights)
    with pytest.raises(RunError, match="is not the file that .* was measured on: its sha256 differs"):
        pack(path, tmp_path / "outputs", tmp_path / "release")
    weights.unlink()
    with pytest.raises(RunError, match="name the folder that has them with GKL_OUTPUTS"):
        pack(path, tmp_path / "outputs", tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_an_upload_without_a_token_or_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = finished(tmp_path, "wrn_10_1", {})
    pack(path, tmp_path / "outputs", tmp_path / "release")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RunError, match="run `hf auth login` or set HF_TOKEN"):
        upload(tmp_path / "release", "me/gkl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"run=... must be a record, a seed<k>.json below results/runs, got nothing"),
        (["run=nowhere.json"], "got nowhere.json"),
        (["rnu=x.json"], "unknown setting of a release 'rnu'; did you mean 'run'?"),
    ],
)
def test_what_a_person_can_get_wrong(arguments: list[str], message: str, command: Command) -> None:  # noqa: F811
    code, _, err = command("release", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", ["model/clip", "model/own"])
def test_a_network_that_timm_does_not_know_is_not_packed(kind: str, tmp_path: Path) -> None:
    path, _ = finished(tmp_path, "wrn_10_1", {})
    made = json.loads(path.read_text())
    made["config"]["model"] = {"_target_": kind, "name": "clip_scan_48"}
    made["config_hash"] = config_hash(made["config"])
    path.write_text(json.dumps(made))
    with pytest.raises(RunError, match=f"trained a network of {kind}, which timm knows by no name"):
        pack(path, tmp_path / "outputs", tmp_path / "release")
    assert not (tmp_path / "release").exists()
