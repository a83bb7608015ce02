"""Clean accuracy and AutoAttack of any checkpoint: ours, the authors', RobustBench's.

    python scripts/evaluate.py checkpoint=outputs/.../swa.pt model=wrn_34_10 data=cifar100
    python scripts/evaluate.py checkpoint=... model=wrn_10_1 data=digits evaluation.epsilon=0.15 evaluation=screen

Finished batches are kept beside the checkpoint's name under GKL_OUTPUTS: the same command goes on where it was stopped.
With torchrun in front it shares the batches over several devices.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from gkl.models import load_checkpoint
from trainers.command import run_main
from trainers.configuration import ConfigError, check_values, compose, make
from trainers.report import Console
from trainers.robustness import autoattack, clean_accuracy
from trainers.run import device_of, process_group


def main(arguments: list[str]) -> int:
    """Compose, check, load, evaluate, print. Returns the exit code."""
    config = compose("evaluate", arguments)
    check_values(config)
    path = Path(config["checkpoint"])
    if not path.is_file():
        raise ConfigError(f"no checkpoint at {path}; set checkpoint=... to a .pt, .pth or .safetensors file")
    with process_group(config):
        first = os.environ.get("RANK", "0") == "0"
        device = device_of(config)
        console = Console(path.name, enabled=first)
        data = make(config["data"])
        model = make(config["model"], num_classes=data.num_classes)
        try:
            console.say(str(load_checkpoint(model, path)))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model.to(device).eval()
        folder = (
            Path(config["paths"]["outputs"])
            / "evaluations"
            / hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        )
        clean = clean_accuracy(model, data, device)
        console.say(f"clean accuracy {clean:.2f} % of {len(data.test_labels)} images of {data.name}")
        metrics, details = autoattack(
            model, data, config["evaluation"], folder=folder, device=device, console=console
        )
        if first:
            print(
                json.dumps(
                    {"checkpoint": path.name, "data": data.name, "clean": clean, **metrics, **details},
                    indent=1,
                )
            )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
