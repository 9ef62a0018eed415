"""Profiles: what a machine is expected to do, as data that the suites are written against.

A profile (`suites/profiles/NAME.yaml`, checked against `schemas/profile.schema.json`) names the
server, the load that its lessons drive and the bounds they assert. `variants` are the other servers
that a lesson compares with: the same one with other arguments, or another config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llmserve.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """A server beside the profile's own: `server` is another config's name (None: the same config),
    `args` and `env` are merged into its own, `options` into the options of its emulation."""

    server: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What the suites need to know of a machine. Times are seconds, lengths tokens.

    `users` load it fully, `duration` is the measured time of one load, `prompt_tokens` and
    `output_tokens` the lengths of a request. `bounds` are numbers by name: a metric's
    (`ttft.p95`) or one that a lesson explains in its README. `hardware`, `model`, `weights` and
    `kv` name what physics allows (None: not known, nothing is refused). `source` is its file.
    """

    name: str
    server: str
    users: int
    duration: float
    prompt_tokens: int
    output_tokens: int
    bounds: Mapping[str, float]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    hardware: str | None = None
    model: str | None = None
    weights: str = "bf16"
    kv: str = "bf16"
    source: str = ""

    def bound(self, name: str) -> float:
        """The bound of this name. Raises ConfigError, naming the file, if it has none."""
        if name not in self.bounds:
            raise ConfigError(
                f"{self.source}: bounds: there is no {name!r}; add it, or take the profile from "
                f"which it can be had with `extends` (it has {', '.join(self.bounds)})."
            )
        return self.bounds[name]


def load_profile(name_or_path: str, directories: Sequence[Path]) -> Profile:
    """The profile of that name in the first of `directories` that has it, or of that file.

    Raises ConfigError: one sentence with the file, the key and the mend, also if the profile asks
    for what its own hardware cannot do.
    """
    from pytest_llmserve.yaml_files import find

    path = find(name_or_path, directories, "profile")
    plain = _merged(path, directories, ())
    for key in _REQUIRED:
        if key not in plain:
            raise ConfigError(f"{path}: the key {key!r} is missing; add it, or `extends: PROFILE`.")
    variants = {name: Variant(**given) for name, given in plain.pop("variants", {}).items()}
    profile = Profile(name=path.stem, source=str(path), variants=variants, **plain)
    refuse_impossible(profile)
    return profile


_REQUIRED = ("server", "users", "duration", "prompt_tokens", "output_tokens", "bounds")


def _merged(path: Path, directories: Sequence[Path], below: tuple[Path, ...]) -> dict[str, Any]:
    """The file's keys over those of the profile that it extends; `bounds` and `variants` are merged
    name by name."""
    from pytest_llmserve.yaml_files import find, read

    plain = read(path, "profile.schema.json", "profile")
    plain.pop("description", None)
    for holder in (plain, *filter(None, plain.get("variants", {}).values())):
        for key in {"extends", "server"} & holder.keys():
            holder[key] = _located(path, holder[key])
    parent = plain.pop("extends", None)
    if parent is None:
        return plain
    base_path = find(parent, directories, f"profile that {path} extends:")
    if base_path.resolve() in (*below, path.resolve()):
        raise ConfigError(f"{path}: extends: {parent!r} extends this profile; break the circle.")
    base = _merged(base_path, directories, (*below, path.resolve()))
    for name in ("bounds", "variants"):
        merged = {**base.get(name, {}), **plain.get(name, {})}
        # `null` takes away what the other profile has.
        plain[name] = {key: value for key, value in merged.items() if value is not None}
    return {**base, **plain}


def _located(path: Path, name: str) -> str:
    """A name as it is; a file's place as seen from the profile's folder."""
    from pytest_llmserve.yaml_files import is_path

    return str(path.parent / Path(name).expanduser()) if is_path(name) else name


def refuse_impossible(profile: Profile) -> None:
    """ConfigError, with the arithmetic, for a bound that the profile's hardware cannot meet."""
    if profile.hardware is None or profile.model is None:
        return
    from pytest_llmserve.emulator.catalog import load_hardware, load_model
    from pytest_llmserve.metrics.limits import forbidden
    from pytest_llmserve.metrics.roofline import Precision
    from pytest_llmserve.verdict.slo import Objective, known_metrics

    try:
        hardware, shape = load_hardware(profile.hardware), load_model(profile.model)
        precision = Precision(profile.weights, profile.kv)
    except ConfigError as error:
        raise ConfigError(f"{profile.source}: {error}") from None
    for name, bound in profile.bounds.items():
        if name not in known_metrics():
            continue  # a bound that a lesson explains, not one of a metric
        objective = Objective(name, ">=" if "throughput" in name else "<=", bound)
        reason = forbidden(
            objective,
            shape,
            hardware,
            precision,
            users=profile.users,
            prompt_tokens=profile.prompt_tokens,
            output_tokens=profile.output_tokens,
        )
        if reason:
            raise ConfigError(f"{profile.source}: bounds: {reason}")
