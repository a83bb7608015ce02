"""Which runs a table needs, which of them are done, and what the missing ones cost.

Forward-equivalents follow from the recipe, FLOPs of one forward from the network, hours from an assumed rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from gkl.records import read_record
from trainers.configuration import CONFIGS, ConfigError, compose, make, unknown
from trainers.run import record_path, run_folder

TFLOPS = 10.0  # sustained by one 3090-class card in float32; an assumption, said wherever hours are printed
STATES = ("done", "failed", "started", "missing")
SEEDS = {"paper": [0, 1, 2], "small": [0, 1, 2], "smoke": [0]}
# Per attacked test image, in forward passes: what AutoAttack takes to prove a survivor, and the share that survives.
AUTOATTACK_FORWARDS, SURVIVORS = 9755, 0.35
# Sizes that cannot be looked up without the data: name of the data function -> (train, test images, side, classes).
SIZES = {
    "cifar10": (50_000, 10_000, 32, 10),
    "cifar100": (50_000, 10_000, 32, 100),
    "digits": (1_437, 360, 8, 10),
}


@dataclass(frozen=True)
class Cell:
    """One run of a table: a row and a seed."""

    row: str
    config: dict[str, Any]

    @property
    def record(self) -> Path:
        """Where its record is or will be."""
        return record_path(self.config)

    @property
    def status(self) -> str:
        """done, failed, started (there is a checkpoint) or missing."""
        if self.record.exists():
            return str(read_record(self.record)["status"])
        return "started" if (run_folder(self.config).path / "checkpoints").exists() else "missing"


def tables() -> dict[str, Path]:
    """The tables that can be made, by the number a person types: "3" -> configs/table/table03.yaml."""
    return {
        str(int(p.stem.removeprefix("table"))): p for p in sorted((CONFIGS / "table").glob("table*.yaml"))
    }


def load_table(number: str) -> dict[str, Any]:
    """The table's configuration. Raises ConfigError for one that does not exist."""
    known = tables()
    if str(number) not in known:
        raise ConfigError(unknown("table", str(number), list(known)))
    table = OmegaConf.to_container(OmegaConf.load(known[str(number)]))
    assert isinstance(table, dict)
    return {str(key): value for key, value in table.items()} | {"name": known[str(number)].stem}


def row_config(experiment: str, scale: str, protocol: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a row at a scale, seed 0."""
    return compose(
        "train", [f"experiment={experiment}", f"scale={scale}", f"protocol={protocol}", *overrides]
    )


def cells(
    table: Mapping[str, Any],
    *,
    scale: str,
    protocol: str,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Every run the chosen rows need, each once, seeds of a row together. Raises ConfigError for an unknown row."""
    runnable = {row["id"]: row["experiment"] for row in table["rows"] if row["experiment"]}
    for row in rows or ():
        if row not in runnable:
            raise ConfigError(unknown(f"row of {table['name']}", row, list(runnable)))
    found: dict[Path, Cell] = {}
    for row in rows or runnable:
        config = row_config(runnable[row], scale, protocol, overrides)
        for seed in seeds if seeds is not None else SEEDS[scale]:
            cell = Cell(row, {**config, "seed": seed})
            found.setdefault(cell.record, cell)
    return list(found.values())


def expected(table: Mapping[str, Any], *, scale: str, protocol: str) -> dict[str, dict[str, Any]]:
    """For each row with an experiment, the configuration its runs have at this scale without overrides."""
    return {
        row["id"]: row_config(row["experiment"], scale, protocol)
        for row in table["rows"]
        if row["experiment"]
    }


def summary(title: str, scale: str, plan: Sequence[Cell]) -> str:
    """Lines for a person: each row's runs by state, and what the missing ones cost."""
    lines = [f"{title}, scale={scale}: {sum(c.status == 'done' for c in plan)} of {len(plan)} runs done"]
    total: float | None = 0.0
    for row in dict.fromkeys(cell.row for cell in plan):
        mine = [cell for cell in plan if cell.row == row]
        states = {state: [c.config["seed"] for c in mine if c.status == state] for state in STATES}
        line = f"  {row:16} {mine[0].config['experiment']:22} "
        line += ", ".join(
            f"{state}: seed {' '.join(map(str, seeds))}" for state, seeds in states.items() if seeds
        )
        if left := sum(len(seeds) for state, seeds in states.items() if state != "done"):
            hours = gpu_hours(mine[0].config)
            total = None if hours is None or total is None else total + left * hours
            line += f"; each {_hours(hours)}, {disk_bytes(mine[0].config) / 1e9:.1g} GB on disk"
        lines.append(line)
    if any(cell.status != "done" for cell in plan):
        lines.append(
            f"  to do: {_hours(total)}, at an assumed {TFLOPS:g} TFLOP/s sustained by a 3090-class card"
        )
    return "\n".join(lines)


def _hours(hours: float | None) -> str:
    if hours is None:
        return "an unknown number of GPU-hours for this data"
    return (
        "under 0.01 GPU-hours"
        if hours < 0.01
        else f"about {hours:,.0f} GPU-hours"
        if hours >= 10
        else f"about {hours:.2g} GPU-hours"
    )


def forward_flops(config: Mapping[str, Any], side: int, num_classes: int) -> float:
    """FLOPs (two per multiply-add) of one image's forward pass, counted on the network itself without computing it."""
    with torch.device("meta"):
        model = make(config["model"], num_classes=num_classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())


def gpu_hours(config: Mapping[str, Any]) -> float | None:
    """Hours of one card at TFLOPS for training and AutoAttack; None for data whose size is not known beforehand.

    In forwards F of one image (backward to the input 1 F, to everything 2 F), K attack steps: attack 2K + 1, AWP 6,
    the step itself 6.
    """
    size = SIZES.get(config["data"]["_target_"].rpartition(".")[2])
    if size is None:
        return None
    train, test, side, num_classes = size
    epochs, method = config["epochs"], config["method"]
    attack = make(config["attack"])
    forwards = 0.0
    for epoch in range(1, epochs + 1):
        awp = 6 if method["awp_gamma"] > 0 and epoch >= method["awp_start_epoch"] else 0
        forwards += (
            train * len(method["view_weights"]) * (2 * attack.budget(epoch, epochs)["steps"] + 1 + awp + 6)
        )
    attacked = config["evaluation"]["images"] or test
    forwards += epochs * test + attacked * SURVIVORS * AUTOATTACK_FORWARDS
    return forwards * forward_flops(config, side, num_classes) / (TFLOPS * 1e12) / 3600


def disk_bytes(config: Mapping[str, Any]) -> float:
    """Rough size of a run's folder: two checkpoints (weights, momentum, averages) and the exported weights."""
    with torch.device("meta"):
        model = make(
            config["model"],
            num_classes=SIZES.get(config["data"]["_target_"].rpartition(".")[2], (0, 0, 0, 10))[3],
        )
    networks = 1 + len(config["averages"])
    return 4.0 * sum(p.numel() for p in model.parameters()) * (2 * (networks + 1) + networks)
