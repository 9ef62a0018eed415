"""The machines and models that come with the emulator, and those a path names."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pytest_llmserve.engines.models import normalise_model
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.roofline import Hardware, ModelShape

_DATA = Path(__file__).parent / "data"
# What publishers append to a model's name when they quantize it.
_SUFFIX = re.compile(r"-(nvfp4|fp8|fp4|int4|awq|gptq|bf16|instruct|base)$")


def hardware_names() -> list[str]:
    return sorted(path.stem for path in (_DATA / "hardware").glob("*.yaml"))


def model_names() -> list[str]:
    return sorted(path.parent.name for path in (_DATA / "models").glob("*/config.json"))


def load_hardware(name: str) -> Hardware:
    """The machine of that name, or the one that the YAML file `name` describes.

    Raises ConfigError for an unknown name and a file that does not describe a machine.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _DATA / "hardware" / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text())
    except OSError:
        known = ", ".join(hardware_names())
        raise ConfigError(
            f"hardware {name!r} is not known: use one of {known}, or the path of a YAML file"
        ) from None
    except yaml.YAMLError as wrong:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(wrong).split())})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: it must be a mapping like the shipped hardware files")
    keys = {f.name for f in fields(Hardware)} - {"name", "devices"}
    wanted = keys - {"link_bandwidth", "link_latency"}
    for key in sorted((wanted - set(data)) | (set(data) - keys)):
        what = "is missing" if key in wanted else f"is not known; the keys are {sorted(keys)}"
        raise ConfigError(f"{path}: the key {key!r} {what}")
    return Hardware(name=path.stem, **_checked(data, path))


def _checked(data: dict[str, Any], path: Path) -> dict[str, Any]:
    flops = data["flops"]
    if not (isinstance(flops, dict) and "bf16" in flops):
        raise ConfigError(f"{path}: 'flops' must map precisions to FLOP/s and name at least bf16")
    others = ("title", "source", "flops", "overhead", "link_latency")
    numbers = {k: v for k, v in data.items() if k not in others}
    for key, value in [*numbers.items(), *((f"flops.{k}", v) for k, v in flops.items())]:
        if not (isinstance(value, (int, float)) and value > 0):
            raise ConfigError(f"{path}: {key!r} must be a positive number, not {value!r}")
    for key in ("overhead", "link_latency"):
        value = data.get(key, 0)
        if not (isinstance(value, (int, float)) and value >= 0):
            raise ConfigError(f"{path}: {key!r} must be a number of seconds, not negative")
    return data


def load_model(name: str) -> ModelShape:
    """The shape of a shipped model, or of the `config.json` that the path `name` leads to.

    A publisher's name finds its model too (`nvidia/Qwen3-8B-NVFP4` is `qwen3-8b`), and so do other
    spellings.
    Raises ConfigError for an unknown name and a config that is not a dense decoder's.
    """
    given = Path(name)
    path = given / "config.json" if given.is_dir() else given
    if not path.is_file():
        spelled, _ = normalise_model(name)  # "Qwen3 7B"
        short = spelled.rstrip("/").rsplit("/", 1)[-1].lower()
        while (bare := _SUFFIX.sub("", short)) != short:
            short = bare
        path = _DATA / "models" / short / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"model {name!r} is not known: use one of {', '.join(model_names())}, "
                "or the path of a config.json or of a model folder"
            )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as wrong:
        raise ConfigError(f"{path}: not readable as JSON ({wrong})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: it must be a JSON object")
    return ModelShape.from_config(config, path.parent.name or str(path))
