"""Command-line options and their ini twins, read once into frozen `Settings`.

An option left off the command line falls back to the ini key of the same name
(`--llmserve-engine` → `llmserve_engine`), then to its default.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from pytest_llmserve.errors import ConfigError

if TYPE_CHECKING:
    import pytest

UpdateMode = Literal["none", "new", "all"]


@dataclass(frozen=True)
class Option:
    """One option: its command-line name without `--llmserve-`, and what argparse and ini need."""

    name: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    default: str | bool | None = None

    @property
    def flag(self) -> str:
        return f"--llmserve-{self.name}"

    @property
    def ini(self) -> str:
        return "llmserve_" + self.name.replace("-", "_")


OPTIONS = (
    Option(
        "engine",
        "engine to use: auto (the endpoint if one is given, else the server config's engine if it "
        "and its GPU are here, else the emulated engine), emulator, vllm, tensorrt-llm, …",
        metavar="NAME",
        default="auto",
    ),
    Option("endpoint", "measure a server that runs already, at this base URL", metavar="URL"),
    Option("api-key-env", "environment variable that holds the endpoint's API key", metavar="NAME"),
    Option("model", "model to serve, or the name under which the endpoint serves it", metavar="M"),
    Option("server", "server config to use: a name or a YAML file", metavar="NAME|FILE"),
    Option(
        "profile",
        "what is expected of this machine, its server included: a name or a YAML file",
        metavar="NAME|FILE",
    ),
    Option("baselines", "folder of baselines (default: baselines)", "DIR", default="baselines"),
    Option(
        "update-baselines",
        "store runs as baseline: none, new (until each load has enough), all (always)",
        choices=("none", "new", "all"),
        default="none",
    ),
    Option("reason", "why a worse baseline is accepted; stored with it", metavar="TEXT"),
    Option(
        "repeats",
        "new runs that a comparison with a baseline rests on: a number (default: 1, and a second "
        "if that one is suspicious), or auto: as many as the verdict needs",
        metavar="N|auto",
        default="1",
    ),
    Option("strict", "inconclusive tests fail", default=False),
    Option("json", "write every run with metrics, validity and verdicts here", metavar="FILE"),
    Option(
        "benchmark-json",
        "write throughput in the format of pytest-benchmark here, as seconds per output token",
        metavar="FILE",
    ),
    Option("report", "write the HTML report here (needs the extra: report)", metavar="FILE"),
    Option("markdown", "write the Markdown report here", metavar="FILE"),
)

#: Options without which a command that is proposed would measure something else.
_DECIDING = ("engine", "endpoint", "api-key-env", "model", "server", "profile", "baselines")


@dataclass(frozen=True)
class Settings:
    """All settings of one pytest run. Paths are absolute; `server` is what the command line says,
    which wins over markers, and `default_server` what the ini file says, which does not: a
    profile's server comes before it. `given` are the options of the command line that decide what
    is measured and by which baselines; `command` is all that was typed."""

    rootdir: Path
    engine: str
    endpoint: str | None
    api_key_env: str | None
    model: str | None
    server: str | None
    default_server: str | None
    server_dirs: tuple[Path, ...]
    profile: str | None
    profile_dirs: tuple[Path, ...]
    baselines: Path
    update_baselines: UpdateMode
    reason: str | None
    repeats: int | Literal["auto"]
    strict: bool
    json: Path | None
    benchmark_json: Path | None
    report: Path | None
    markdown: Path | None
    given: tuple[str, ...]
    command: str


def add_options(parser: pytest.Parser) -> None:
    """Register the options and their ini twins."""
    group = parser.getgroup("llmserve", "serving language models under load")
    for option in OPTIONS:
        if isinstance(option.default, bool):
            group.addoption(option.flag, action="store_true", default=None, help=option.help)
            parser.addini(option.ini, option.help, type="bool", default=option.default)
        else:
            group.addoption(
                option.flag, metavar=option.metavar, choices=option.choices, help=option.help
            )
            parser.addini(option.ini, option.help, default=option.default)
    parser.addini(
        "llmserve_server_dirs",
        "folders of server configs (default: suites/servers servers)",
        type="paths",
        default=[],
    )


def read_settings(config: pytest.Config) -> Settings:
    """Settings from the command line, then the ini file, then defaults.

    Raises ConfigError, naming the option and the mend, for a value that cannot be right.
    """
    root = config.rootpath
    given: dict[str, Any] = {}
    deciding: list[str] = []
    for option in OPTIONS:
        value = config.getoption(option.flag.lstrip("-").replace("-", "_"))
        given[option.name] = config.getini(option.ini) if value is None else value
        if value is not None and option.name in _DECIDING:
            deciding.append(f"{option.flag}={value}")
    mode = given["update-baselines"]
    if mode not in ("none", "new", "all"):
        raise ConfigError(f"llmserve_update_baselines = {mode!r}: write none, new or all")
    dirs = config.getini("llmserve_server_dirs") or [root / "suites/servers", root / "servers"]
    endpoint = check_endpoint(given["endpoint"], "--llmserve-endpoint")
    if endpoint and given["engine"] == "emulator":
        raise ConfigError(
            "--llmserve-endpoint and --llmserve-engine emulator exclude each other: give one"
        )
    on_command_line = config.getoption("llmserve_server")
    files = {
        name: _writable(config.invocation_params.dir, given[name], f"--llmserve-{name}")
        for name in ("json", "benchmark-json", "report", "markdown")
    }
    if files["report"]:
        from pytest_llmserve.report.html import require

        require()
    return Settings(
        rootdir=root,
        engine=given["engine"],
        endpoint=endpoint,
        api_key_env=given["api-key-env"] or None,
        model=given["model"] or None,
        server=on_command_line,
        default_server=None if on_command_line else given["server"] or None,
        server_dirs=tuple(Path(d) for d in dirs),
        profile=given["profile"] or None,
        profile_dirs=(root / "suites/profiles", root / "profiles"),
        baselines=_baselines(root / given["baselines"]),
        update_baselines=cast("UpdateMode", mode),
        reason=given["reason"] or None,
        repeats=_repeats(given["repeats"]),
        strict=bool(given["strict"]),
        json=files["json"],
        benchmark_json=files["benchmark-json"],
        report=files["report"],
        markdown=files["markdown"],
        given=tuple(deciding),
        command=shlex.join(["pytest", *map(str, config.invocation_params.args)]),
    )


def check_endpoint(url: str | None, where: str) -> str | None:
    """The base URL without a trailing slash or `/v1`, or ConfigError naming `where` it was said."""
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{where} {url!r} is not a base URL: write one such as http://127.0.0.1:8000"
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"{where}: no user or password in the URL, because it is shown in reports: "
            "put the key into an environment variable and name that with --llmserve-api-key-env"
        )
    return url.rstrip("/").removesuffix("/v1")


def _baselines(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--llmserve-baselines {path}: is a file; name a folder")
    return path


def _repeats(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"--llmserve-repeats {text!r}: write a whole number from 1 up, or auto")
    return int(text)


def _writable(folder: Path, name: str | None, flag: str) -> Path | None:
    if not name:
        return None
    path = folder / name
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: the folder {path.parent} does not exist; make it")
    return path
