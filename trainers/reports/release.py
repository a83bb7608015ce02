"""A run as others take it: weights, configuration and model card for the Hugging Face Hub, and RobustBench's entry.

    folder = pack(record_path, outputs, target)     # everything on disk, no network
    upload(folder, "name/repository")               # with the token of `hf auth login` or HF_TOKEN

The folder loads back by timm: timm.create_model("local-dir:FOLDER", pretrained=True), after the upload "hf-hub:name/repository"; our
own networks are known to timm once gkl.models is imported.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gkl.models import create
from gkl.models.normalise import mean_and_std
from gkl.models.timm_network import TimmNetwork
from trainers.errors import RunError
from trainers.files import write_atomically, write_text
from trainers.reports.page import command
from trainers.runs.records import Record, read_record

PAPER = "https://arxiv.org/abs/2503.08038"
PAPER_TITLE = "Generalized Kullback-Leibler Divergence Loss"
AUTHORS = (
    "Jiequan Cui, Beier Zhu, Qingshan Xu, Zhuotao Tian, Xiaojuan Qi, Bei Yu, Hanwang Zhang, Richang Hong"
)
ROBUSTBENCH = {
    "cifar10": 10_000,
    "cifar100": 10_000,
}  # data sets it takes from us -> test images AutoAttack must have seen


def pack(record_path: Path, outputs: Path, target: Path) -> list[Path]:
    """Write a run's release into `target` and return the files. Raises RunError when its weights are not the record's."""
    record = read_record(record_path)
    weights = outputs / record["checkpoint"]["path"]
    if not weights.is_file():
        raise RunError(
            f"the weights of {record_path} are not at {weights}; name the folder that has them with GKL_OUTPUTS=..."
        )
    if hashlib.sha256(weights.read_bytes()).hexdigest() != record["checkpoint"]["sha256"]:
        raise RunError(f"{weights} is not the file that {record_path} was measured on: its sha256 differs")
    settings = {
        key: value for key, value in record["config"]["model"].items() if key not in ("_target_", "_partial_")
    }
    if (kind := record["config"]["model"]["_target_"]) != "model/create":
        raise RunError(
            f"{record_path} trained a network of {kind}, which timm knows by no name; a release packs classifiers made by name, and the "
            f"weights in {weights} are as they are"
        )
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model = create(**settings, num_classes=classes(state, settings))
    model.load_state_dict(state)
    files = {
        "config.json": json.dumps(timm_config(record, settings, model), indent=1) + "\n",
        "README.md": card(record, settings),
        "record.json": record_path.read_text(encoding="utf-8"),
    }
    if (why := not_for_robustbench(record)) is None:
        entry = f"Reproduced{record['finished'][:4]}Generalized_{architecture(settings)}"
        files[f"robustbench/{record['data']['name']}/Linf/{entry}.json"] = (
            json.dumps(robustbench(record, settings), indent=1) + "\n"
        )
        files["robustbench/issue.md"] = issue(record, settings, entry)
    else:
        files["robustbench/NOT_WRITTEN.md"] = f"RobustBench would not take this run: {why}.\n"
    inner = model.model if isinstance(model, TimmNetwork) else model
    tensors = {name: tensor.contiguous() for name, tensor in inner.state_dict().items()}
    written = [target / "model.safetensors"]
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(written[0], lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    for name, text in files.items():
        write_text(target / name, text)
        written.append(target / name)
    return written


def classes(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> int:
    """How many classes the weights tell apart: the length of the classifier's bias."""
    trial = create(**settings, num_classes=2)
    layer = trial.get_classifier()  # type: ignore[operator]
    (name,) = [name for name, module in trial.named_modules() if module is layer]
    return len(state[f"{name}.bias"])


def architecture(settings: Mapping[str, Any]) -> str:
    """RobustBench's way of writing a network's name: WRN-34-10."""
    return str(settings["name"]).upper().replace("_", "-")


def timm_config(record: Record, settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The config.json from which timm builds the network: pictures in [0, 1], shifted and scaled inside ours, outside timm's own."""
    options = {
        key: value
        for key, value in settings.items()
        if key not in ("name", "timm_options") and value is not None
    }
    size = record["config"]["data"].get("image_size") or {"digits": 8}.get(record["data"]["name"], 32)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if isinstance(model, TimmNetwork) and (normalisation := options.pop("normalisation", "none")) != "none":
        statistics = mean_and_std(normalisation)
    return {
        "architecture": settings["name"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {**options, "num_classes": model.num_classes},
        "pretrained_cfg": {
            "tag": f"gkl_{record['config_hash']}_seed{record['seed']}",
            "num_classes": model.num_classes,
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(statistics[0]),
            "std": list(statistics[1]),
            "license": "mit",
            "paper_ids": "arXiv:2503.08038",
        },
    }


def card(record: Record, settings: Mapping[str, Any]) -> str:
    """The model card, with the numbers of the record and nothing else."""
    data, metrics = record["data"], record["metrics"]
    stand_in = data["stand_in_for"]
    named = (
        f"{data['name']} (a stand-in for {stand_in}: its numbers compare with no published ones)"
        if stand_in
        else data["name"]
    )
    evaluation = record.get("evaluation", {})
    attacked = (
        f"{evaluation['attack']}, {evaluation['norm']}, ε = {evaluation['epsilon']:.5g}, {evaluation['n']} test images"
        if "attack" in evaluation
        else None
    )
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in sorted(metrics.items()))
    own = not isinstance(
        create(**settings, num_classes=2), TimmNetwork
    )  # then the network does its own shift and scale
    return f"""---
library_name: timm
license: mit
tags: [image-classification, {"adversarial-robustness" if attacked else "knowledge-distillation"}, gkl]
---
# {record["experiment"]}, seed {record["seed"]}

{settings["name"]}, trained on {data["train"]:,} images of {named}, by the reproduction of
[{PAPER_TITLE}]({PAPER}) ({AUTHORS}). Scale `{record["scale"]}`, protocol `{record["protocol"]}`.

| metric | % |
|---|---:|
{rows}

{f"Attacked by {attacked}." if attacked else f"Measured on {data['test']:,} test images."} Pictures are float in [0, 1];
{"the network takes them so" if own else "shift and scale them as config.json says"}.

```python
import timm
{"import gkl.models  # makes the network known to timm" + chr(10) if own else ""}model = timm.create_model("hf-hub:NAME/REPOSITORY", pretrained=True).eval()    # or "local-dir:FOLDER"
```

Trained again by `{command(record)}`
(code {record["code"].get("commit") or "unknown"}; configuration {record["config_hash"]}). `record.json` holds the whole configuration,
versions, data checksums and cost.
"""


def not_for_robustbench(record: Record) -> str | None:
    """Why RobustBench would not take a run, or None."""
    name, evaluation = record["data"]["name"], record.get("evaluation", {})
    if name not in ROBUSTBENCH:
        return f"it takes {' and '.join(ROBUSTBENCH)}, this is {name}"
    if evaluation.get("attack") != "AutoAttack standard" or evaluation.get("norm") != "linf":
        return "it wants standard AutoAttack in the ℓ∞ norm"
    if evaluation["n"] < ROBUSTBENCH[name] or abs(evaluation["epsilon"] - 8 / 255) > 1e-9:
        return f"it wants ε = 8/255 on all {ROBUSTBENCH[name]:,} test images, this has {evaluation['epsilon']:.5g} on {evaluation['n']}"
    return None


def robustbench(record: Record, settings: Mapping[str, Any]) -> dict[str, Any]:
    """RobustBench's model_info entry."""
    generated = record["data"].get("generated")
    return {
        "link": PAPER,
        "name": PAPER_TITLE,
        "authors": AUTHORS,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": record["data"]["name"],
        "venue": "arXiv 2503.08038",
        "architecture": architecture(settings),
        "eps": "8/255",
        "clean_acc": f"{record['metrics']['clean']:.2f}",
        "reported": f"{record['metrics']['aa']:.2f}",
        "autoattack_acc": f"{record['metrics']['aa']:.2f}",
        "unreliable": False,
        "footnote": "Weights of an independent reproduction."
        + (f" Uses {generated['images']:,} generated pictures in training." if generated else ""),
    }


def issue(record: Record, settings: Mapping[str, Any], entry: str) -> str:
    """The text of RobustBench's form for a new model."""
    generated = record["data"].get("generated")
    return f"""### Paper information
- Title: {PAPER_TITLE}
- Link: {PAPER}
- Authors: {AUTHORS}

### Leaderboard claim
- Dataset: {record["data"]["name"]}, threat model: Linf, ε = 8/255
- Architecture: {architecture(settings)}
- Clean accuracy: {record["metrics"]["clean"]:.2f} %
- AutoAttack accuracy: {record["metrics"]["aa"]:.2f} % ({record["evaluation"]["n"]} images)
- Additional data: {"generated pictures, " + str(generated["images"]) if generated else "none"}

### Model zoo
- Entry: {entry}
- Weights: URL OF THE UPLOADED model.safetensors (sha256 of the checkpoint measured: {record["checkpoint"]["sha256"]})
- Licence: MIT
- An independent reproduction; the weights are not the paper's authors'. Trained again by `{command(record)}`.
"""


def upload(folder: Path, repository: str) -> str:
    """Put a packed release on the Hub; returns its address. Raises RunError without a token or when the Hub refuses."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise RunError(
            "an upload needs a token of the Hugging Face Hub; run `hf auth login` or set HF_TOKEN, then this command again"
        )
    text = folder / "README.md"
    write_text(text, text.read_text(encoding="utf-8").replace("NAME/REPOSITORY", repository))
    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=os.fspath(folder), commit_message="gkl release")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise RunError(
            f"the Hub did not take {repository}: {str(error).splitlines()[0]}; the files are in {folder}"
        ) from error
    return str(address)
