"""Which server a test gets: options, marker and server config files → one `ServerConfig`.

The rule, in order: an endpoint is attached to; `--llmserve-server` wins over the test's marker,
the marker over the profile, the profile over the ini file's `llmserve_server`, and without any the
emulated engine serves. `variant=` is that server as the profile's variant of this name changes it.
Then `--llmserve-engine`: `auto` runs the config's engine if it and its GPU are here and imitates
it with the emulated engine if not; `emulator` always imitates; a real engine's name insists.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmserve.config import Settings, check_endpoint
from pytest_llmserve.errors import ConfigError, UnavailableError
from pytest_llmserve.servers import ContainerRunner, Emulation, ServerConfig

if TYPE_CHECKING:
    from pytest_llmserve.profiles import Profile

#: Arguments of `@pytest.mark.llmserve` and of `factories.llm_server`, with their types.
ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "server": (str,),
    "engine": (str,),
    "model": (str,),
    "args": (dict,),
    "env": (dict,),
    "endpoint": (str,),
    "gpus": (int,),
    "hardware": (str,),
    "ready_timeout": (int, float),
    "emulation": (dict,),
    "variant": (str,),
}


@dataclass(frozen=True)
class Resolved:
    """A config, and what the user should be told about how it was chosen (may be empty)."""

    config: ServerConfig
    notice: str = ""


def check_arguments(where: str, arguments: Mapping[str, Any]) -> None:
    """ConfigError naming `where`, the argument and the mend, if an argument cannot be right."""
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise ConfigError(f"{where}: no argument {name!r}: use {', '.join(ARGUMENTS)}")
        kinds = ARGUMENTS[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name}={value!r} must be {kinds[-1].__name__}")
    if "server" in arguments and "engine" in arguments:
        raise ConfigError(f"{where}: server= names a config that has its engine: drop engine=")
    if "variant" in arguments and len(arguments) > 1:
        raise ConfigError(f"{where}: variant= says all of a server: write it alone")
    alone = set(arguments) - {"server", "engine", "endpoint", "variant"}
    if alone and not {"server", "engine", "endpoint"} & set(arguments):
        raise ConfigError(f"{where}: {sorted(alone)[0]}= needs server= or engine= beside it")


def resolve(settings: Settings, arguments: Mapping[str, Any], where: str) -> Resolved:
    """The server config for a test whose marker (or fixture factory) has these `arguments`.

    Raises ConfigError in one sentence if there is no such config or its engine is not to be had.
    """
    check_arguments(where, arguments)
    endpoint = settings.endpoint or check_endpoint(arguments.get("endpoint"), where)
    if "variant" in arguments:
        config = _variant(settings, arguments["variant"])
        arguments = {}
    elif endpoint:
        return _model(
            ServerConfig(
                name="attach",
                engine="attach",
                endpoint=endpoint,
                gpus=0,
                api_key_env=settings.api_key_env,
            ),
            settings,
        )
    else:
        config = _chosen(settings, arguments, where)
    changes = {k: v for k, v in arguments.items() if k not in ("server", "engine", "endpoint")}
    if isinstance(changes.get("emulation"), dict):
        changes["emulation"] = _emulation(changes["emulation"], where)
    for merged in ("args", "env"):
        if merged in changes:
            changes[merged] = {**getattr(config, merged), **changes[merged]}
    config = dataclasses.replace(config, **changes)
    named = _model(config, settings)
    found = _engine(named.config, settings)
    return dataclasses.replace(found, notice=" ".join(filter(None, (named.notice, found.notice))))


def missing(config: ServerConfig) -> str | None:
    """What this machine lacks to run the config for real, in a few words; None if nothing."""
    if config.gpus > 0 and not (
        Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()
    ):
        return "no NVIDIA GPU here"
    runner = config.runner
    if isinstance(runner, ContainerRunner):
        wanted = (runner.runtime,) if runner.runtime else ("docker", "podman")
        if not any(shutil.which(name) for name in wanted):
            return f"no {' or '.join(wanted)} here"
        return None
    if runner.interpreter:
        found = shutil.which(runner.interpreter)
        return None if found else f"no interpreter {runner.interpreter} here"
    from pytest_llmserve.engines import get_engine

    program = runner.executable or get_engine(config.engine).program
    return None if shutil.which(program) else f"no {program} here"


def emulate(config: ServerConfig) -> ServerConfig | None:
    """The config that imitates this one with the emulated engine; None if it does not say how."""
    if config.engine == "emulator":
        return config
    if config.emulation is None:
        return None
    plain = ServerConfig(name=config.name, engine="emulator")
    return dataclasses.replace(
        config, engine="emulator", gpus=0, runner=plain.runner, env=plain.env, api_key_env=None
    )


def profile_of(settings: Settings) -> Profile | None:
    """The profile that the options name; None if they name none. Raises ConfigError."""
    if settings.profile is None:
        return None
    from pytest_llmserve.profiles import load_profile

    return load_profile(settings.profile, settings.profile_dirs)


def _variant(settings: Settings, name: str) -> ServerConfig:
    """The server of the options, as the profile's variant changes it."""
    profile = profile_of(settings)
    if profile is None or name not in profile.variants:
        there = f"profile {profile.name} has none" if profile else "no profile is chosen"
        raise UnavailableError(f"needs the variant {name!r} of a server, and {there}")
    if settings.endpoint:
        raise UnavailableError(
            f"needs the variant {name!r} of the server, and --llmserve-endpoint gives one only"
        )
    variant = profile.variants[name]
    chosen = dataclasses.replace(settings, server=variant.server or settings.server)
    config = _chosen(chosen, {}, "")
    emulation = config.emulation
    if variant.options and emulation is not None:
        options = {**emulation.options, **variant.options}
        emulation = dataclasses.replace(emulation, options=options)
    return dataclasses.replace(
        config,
        name=f"{config.name}-{name}" if variant.server is None else config.name,
        args={**config.args, **variant.args},
        env={**config.env, **variant.env},
        emulation=emulation,
    )


def _chosen(settings: Settings, arguments: Mapping[str, Any], where: str) -> ServerConfig:
    name = settings.server or arguments.get("server")
    if not name and "engine" in arguments:
        return _inline(arguments["engine"], str(arguments.get("model", "")))
    profile = profile_of(settings) if not name else None
    default = profile.server if profile else settings.default_server
    name = name or default
    if name:
        from pytest_llmserve.server_files import find_server_config

        config = find_server_config(name, settings.server_dirs)
        mismatch = settings.engine not in ("auto", "emulator", config.engine)
        if not (mismatch and settings.model and name == default):
            return config
    if settings.engine in ("auto", "emulator"):
        return _inline("emulator", "")
    if not settings.model:
        raise ConfigError(
            f"--llmserve-engine {settings.engine} has nothing to serve: add --llmserve-server NAME "
            "or --llmserve-model MODEL"
        )
    return _inline(settings.engine, settings.model)


def _inline(engine: str, model: str) -> ServerConfig:
    from pytest_llmserve.engines import get_engine

    known = get_engine(engine)
    emulation = Emulation() if known.name == "emulator" else None
    return ServerConfig(
        name=known.name,
        engine=known.name,
        model=model or ("Qwen3-8B" if emulation else ""),
        gpus=1 if known.needs_gpu else 0,
        emulation=emulation,
    )


def _emulation(given: dict[str, Any], where: str) -> Emulation:
    known = {field.name for field in dataclasses.fields(Emulation)}
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: emulation has no {key!r}: use {', '.join(sorted(known))}")
    return Emulation(**given)


def _model(config: ServerConfig, settings: Settings) -> Resolved:
    from pytest_llmserve.engines import normalise_model

    name, notice = normalise_model(settings.model or config.model)
    return Resolved(dataclasses.replace(config, model=name), notice or "")


def _engine(config: ServerConfig, settings: Settings) -> Resolved:
    from pytest_llmserve.engines import get_engine

    wanted = settings.engine
    engine = get_engine(config.engine).name if wanted == "auto" else get_engine(wanted).name
    if config.engine in ("emulator", "attach") and wanted == "auto":
        return Resolved(config)
    if engine == "emulator":
        imitation = emulate(config)
        if imitation is None:
            raise ConfigError(
                f"server config {config.name} has no emulation section, so the emulated engine "
                f"cannot imitate it: add one to {config.source or 'it'}, or name another config"
            )
        return Resolved(imitation)
    if engine != config.engine:
        raise ConfigError(
            f"--llmserve-engine {wanted}, but server config {config.name} is for {config.engine}: "
            f"name a config for {wanted} with --llmserve-server"
        )
    lacks = missing(config) if wanted == "auto" else None
    if lacks is None:
        return Resolved(config)
    imitation = emulate(config)
    if imitation is None:
        raise ConfigError(
            f"server config {config.name} cannot run ({lacks}) and has no emulation section: "
            "install what is missing, or give --llmserve-endpoint URL or --llmserve-server NAME"
        )
    return Resolved(imitation, f"{config.name} is EMULATED: {lacks}.")
