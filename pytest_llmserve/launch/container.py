"""The container runner: docker or podman, in the foreground, on the host's network.

The client of the runtime is the process that the supervisor keeps; the container itself may
belong to a daemon, so it has a name by which it is stopped and removed. Values of variables
are never on the command line: `--env NAME` takes them from the client's own environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from pytest_llmserve.engines import FILES, Engine, Failure
from pytest_llmserve.errors import ServerError
from pytest_llmserve.servers import ContainerRunner, ServerConfig

RUNTIMES = ("docker", "podman")

#: Where the engine's files are inside.
_INSIDE = "/llmserve"

STAGES = (
    (r"Unable to find image .* locally|Trying to pull|Pulling from", "pulling the image"),
    (r"Status: Downloaded newer image|Writing manifest to image", "image pulled"),
)

FAILURES = (
    Failure(
        r"permission denied while trying to connect to the Docker daemon",
        "this user may not use docker",
        "add the user to the group `docker`, or use podman",
    ),
    Failure(
        r"Cannot connect to the Docker daemon|failed to connect to the docker API",
        "the docker daemon does not run",
        "start it (`systemctl start docker`), or use podman",
    ),
    Failure(
        r"manifest unknown|pull access denied|repository does not exist|"
        r"unable to (?:pull|copy from source)|initializing source|unauthorized: authentication",
        "the image is not here and cannot be pulled",
        "check runner.container.image and the network, or pull it before; nvcr.io may want a login",
    ),
    Failure(
        r"could not select device driver .*gpu|unresolvable CDI devices nvidia\.com/gpu",
        "the container runtime cannot hand out GPUs",
        "install the NVIDIA Container Toolkit and configure the runtime (for podman: `nvidia-ctk "
        "cdi generate`)",
    ),
    Failure(
        r"(?:exec|executable file) .*(?:not found in \$PATH|no such file or directory)",
        "the image does not have the engine's program",
        "correct runner.container.image",
    ),
    Failure(
        r"no space left on device",
        "the disk is full",
        "free about 100 GB for images and model caches (`docker system df` shows what is held)",
    ),
)


def find_runtime(wanted: str | None) -> str:
    """The path of the container runtime: the one asked for, else the first that works.

    Raises ServerError that says what is missing.
    """
    problems = []
    for name in (wanted,) if wanted else RUNTIMES:
        path = shutil.which(str(Path(name).expanduser()))
        if path is None:
            problems.append(f"{name} is not installed")
        elif problem := _broken(path):
            problems.append(f"{name} does not work ({problem})")
        else:
            return path
    raise ServerError(
        f"No container can be run: {'; '.join(problems)}. Install or start one, or give the "
        "server config a process runner."
    )


def container_command(
    runtime: str,
    config: ServerConfig,
    engine: Engine,
    port: int,
    *,
    name: str,
    variables: Iterable[str],
    files: str | None,
    gpus: Sequence[str] = (),
) -> list[str]:
    """The command line that runs the container in the foreground.

    `variables` are names of variables to hand over, `files` the folder with the engine's files
    or None if it has none, `gpus` the GPUs it gets.
    """
    runner = config.runner
    assert isinstance(runner, ContainerRunner)
    words = [runtime, "run", "--rm", "--name", name, "--network", "host"]
    if is_podman(runtime):
        words += [word for gpu in gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]
    elif gpus:
        # docker reads the value as CSV: the quotes keep the commas together
        words += ["--gpus", f'"device={",".join(gpus)}"']
    for mount in (*runner.mounts, *([f"{files}:{_INSIDE}:ro"] if files else ())):
        words += ["--volume", mount]
    for variable in sorted({*variables, *(v for v in runner.env if v in os.environ)}):
        words += ["--env", variable]
    program = [engine.program] if engine.program else ["python3", "-m", engine.module]
    inside = (word.replace(FILES, _INSIDE) for word in engine.command(config, port))
    return [*words, *runner.options, runner.image, *program, *inside]


def stop_command(runtime: str, name: str, timeout: float) -> list[str]:
    """Ends the container gently: SIGTERM, and SIGKILL after `timeout` seconds."""
    return [runtime, "stop", "--time", str(max(1, round(timeout))), name]


def kill_command(runtime: str, name: str) -> list[str]:
    """Ends and removes the container at once; harmless if there is none."""
    return [runtime, "rm", "--force", name]


def image_variables(runtime: str, image: str) -> dict[str, str] | None:
    """The variables that an image sets; None if it is not on this machine."""
    line = [runtime, "image", "inspect", "--format", "{{json .Config.Env}}", image]
    try:
        told = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
        words = json.loads(told.stdout) if told.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if told.returncode:
        return None
    return dict(word.split("=", 1) for word in words or () if "=" in word)


def make_mounts(config: ServerConfig) -> None:
    """Make the folders to be mounted that do not exist yet (a model cache on a fresh machine)."""
    assert isinstance(config.runner, ContainerRunner)
    for mount in config.runner.mounts:
        host = Path(mount.partition(":")[0])
        try:
            if not host.exists():
                host.mkdir(parents=True)
        except OSError as error:
            raise ServerError(
                f"{config.source or config.name}: runner.container.mounts: {host} cannot be made "
                f"({error.strerror}); correct the path."
            ) from None


def is_podman(runtime: str) -> bool:
    return Path(runtime).name.startswith("podman")


def _broken(runtime: str) -> str | None:
    """Why this runtime cannot be used, in its own words; None if it can."""
    try:
        tried = subprocess.run(
            [runtime, "version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if tried.returncode == 0:
        return None
    words = tried.stderr.strip().splitlines()
    return words[-1] if words else f"`version` ends with status {tried.returncode}"
