"""Baselines for tests of the plugin, made of one stored run instead of many measured ones."""

from __future__ import annotations

import json
from pathlib import Path

#: Deviations of the runs of a baseline from their mean, as logs would have them: 1 % or so.
NOISE = (1.0, 1.012, 0.99, 1.006, 0.993)


def files(folder: Path) -> list[Path]:
    """The baseline files below a folder, sorted."""
    return sorted((folder / "baselines").rglob("*.json"))


def loads(path: Path) -> dict:
    """The loads of a baseline file."""
    return json.loads(path.read_text())["loads"]


def multiply(path: Path, speed: float = 1.0, users: int | None = None) -> None:
    """Make five runs of the first one of each load, with `speed` times its output throughput (only
    for the load of so many `users`, if given)."""
    content = json.loads(path.read_text())
    for load in content["loads"].values():
        times = speed if users in (None, load["load"]["users"]) else 1.0
        first = load["runs"][0]
        load["runs"] = [
            {
                **first,
                "id": f"{number:012x}",
                "metrics": {
                    **first["metrics"],
                    "output_throughput": first["metrics"]["output_throughput"] * times * factor,
                },
            }
            for number, factor in enumerate(NOISE)
        ]
        load["origin"] = [run["id"] for run in load["runs"]]
    path.write_text(json.dumps(content))
