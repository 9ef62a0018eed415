"""Starts each server once, hands it to all who ask, and ends it with the run."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_llmserve.engines import Engine, Failure
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch import container, preflight, process, supervisor, tree
from pytest_llmserve.launch.attach import attach, read_api_key
from pytest_llmserve.launch.gpus import Gpus, taken, visible_gpus
from pytest_llmserve.launch.log import Diagnosis, LogFollower, diagnose, last_lines, root_lines
from pytest_llmserve.launch.ports import free_port, listens
from pytest_llmserve.launch.probe import ask, fetcher, listening, served_models
from pytest_llmserve.servers import ContainerRunner, Server, ServerConfig

Progress = Callable[[str], None]

#: A port that was free may be taken before the server binds it; then another one is tried.
_PORT_TRIES = 3
_PORT_TAKEN = r"\[Errno 98\]|[Aa]ddress already in use|Failed to bind socket|couldn't bind"
_LOOK = 0.2  # seconds between two looks at a server that loads
_MEMORY_BACK = 15.0  # seconds in which a driver gives back the memory of processes that ended
_STOP_AT_MOST = 180.0  # seconds for an orderly end, beyond any sensible stop_timeout

_NOT_READY = "was not ready after"

# What any program may say; engines' own tables come first.
_FAILURES = (
    Failure(
        r"^Killed$|Out of memory: Killed process",
        "the system killed it for want of memory",
        "free memory, or make the server smaller",
    ),
    Failure(
        r"ModuleNotFoundError: No module named '?(?P<what>[\w.]+)",
        "its Python lacks the module {what}",
        "install it there, or name another interpreter in the server config",
    ),
    Failure(
        _PORT_TAKEN,
        "the port is taken by another program",
        "leave `port` out of the server config, so that a free one is chosen",
    ),
)


@dataclass(frozen=True)
class _Slot:
    """The files of one server, shared by all processes of the run."""

    folder: Path

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def state(self) -> Path:
        """JSON with the server that runs, or with the sentence why it could not be started."""
        return self.folder / "state.json"

    @property
    def status(self) -> Path:
        """JSON that the supervisor keeps up to date."""
        return self.folder / "status.json"

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def new_log(self) -> Path:
        """A log of its own for each start: that of a server that died is not lost."""
        number = len(list(self.folder.glob("server*.log"))) + 1
        return self.folder / ("server.log" if number == 1 else f"server-{number}.log")


@dataclass
class _Launch:
    """One attempt to start a server."""

    guard: subprocess.Popen[bytes]
    server_id: str
    log: Path
    port: int
    gpus: tuple[str, ...]


class ServerManager:
    """The servers of one pytest run; there is one manager in each of its processes.

    `run_dir` is the run's private folder, which all of them share, and `owner_pid` the process
    (the controller under xdist, else pytest itself) whose end, however it comes, ends all
    servers. Linux only.
    """

    def __init__(self, run_dir: Path, owner_pid: int) -> None:
        self._servers = run_dir / "servers"
        self._owner_pid = owner_pid
        self._guards: list[subprocess.Popen[bytes]] = []

    def get(self, config: ServerConfig, engine: Engine, progress: Progress) -> Server:
        """The running server for a config: started by the first who asks, shared by the others.

        A server that has died since is started again; a start that failed is not tried again.
        `progress` gets the stages of loading in words. Raises ServerError with one diagnosis.
        """
        if engine.name == "attach":
            progress(f"attaching to {config.endpoint}")
            return attach(config)
        slot = self._slot(config, engine)
        slot.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(slot.lock, lambda: progress(f"{config.name} is being started elsewhere")):
            known = _read_json(slot.state)
            if "failed" in known:
                raise ServerError(known["failed"])
            if known:
                server = _server_from(known, config)
                if self.alive(server):
                    # When it was asked for last; touch() would round to the kernel's tick.
                    os.utime(slot.state, ns=(time.time_ns(), time.time_ns()))
                    return server
                tree.sweep(known["server_id"])
            try:
                server, launch = self._start(slot, config, engine, progress)
            except ServerError as error:
                _write_private(slot.state, {"failed": str(error)})
                raise
            facts = {"name": config.name, "server_id": launch.server_id, "gpus": launch.gpus}
            _write_private(slot.state, _plain(server) | facts)
            return server

    def alive(self, server: Server) -> bool:
        """Whether the server's process is still there; one that others run: whether its endpoint
        takes connections. Costs the server nothing, so it may be asked during a load."""
        if server.pid is None:
            return listening(server.endpoint)
        status = self._status_of(server)
        return status.get("state") == "running" and Path(f"/proc/{server.pid}").exists()

    def exit_reason(self, server: Server) -> str | None:
        """Why a server is not there any more, in one sentence; None while it is."""
        if self.alive(server):
            return None
        if server.pid is None:
            return f"{server.endpoint} refuses connections now"
        from pytest_llmserve.engines import get_engine

        status = self._settled(Path(server.log or "").parent / "status.json")
        failures: tuple[Failure, ...] = ()
        with suppress(Exception):  # an engine made by hand is in no table
            failures = get_engine(server.engine).failures
        text = _text(Path(server.log or ""))
        found = diagnose(text, (*failures, *_FAILURES))
        how = _how_it_ended(status)
        why = f": {found.cause}; {found.mend}" if found else ""
        return f"the server {server.config.name} {how}{why}. Its log: {server.log}"

    def stop_all(self) -> None:
        """End all servers of the run and wait until their process trees are gone.

        Only in the owner's process: others leave the servers to those who still use them.
        """
        if os.getpid() != self._owner_pid or not self._servers.is_dir():
            return
        slots = [_Slot(folder) for folder in self._servers.iterdir() if folder.is_dir()]
        statuses = [_read_json(slot.status) for slot in slots]
        for status in statuses:
            _terminate(status)
        for status in statuses:
            _await_end(status)
        for guard in self._guards:
            with suppress(subprocess.TimeoutExpired):
                guard.wait(timeout=5)
        for slot in slots:
            known = _read_json(slot.state)
            if "server_id" in known:
                tree.sweep(known["server_id"])
            slot.state.unlink(missing_ok=True)  # it holds the API key

    def _slot(self, config: ServerConfig, engine: Engine) -> _Slot:
        # Not by name: configs of one key are one server, whatever they are called.
        return _Slot(self._servers / f"{engine.name.replace('/', '-')}-{config.key}")

    def _status_of(self, server: Server) -> dict[str, Any]:
        return _read_json(Path(server.log or "").parent / "status.json")

    def _settled(self, path: Path) -> dict[str, Any]:
        """The status once the supervisor has finished clearing up (its log is then complete)."""
        deadline = time.monotonic() + 5
        while (status := _read_json(path)).get("state") != "ended" and time.monotonic() < deadline:
            time.sleep(0.05)
        return status

    def _start(
        self, slot: _Slot, config: ServerConfig, engine: Engine, progress: Progress
    ) -> tuple[Server, _Launch]:
        api_key = read_api_key(config)
        if api_key is None and engine.api_key:
            api_key = secrets.token_urlsafe(24)
        _check(config, preflight.requirements(config, engine), progress)
        for attempt in range(1, _PORT_TRIES + 1):
            port = config.port or free_port(config.host)
            with self._gpus(slot, config, progress) as gpus:
                _check(config, _memory_back(config, engine), progress)
                launch = self._launch(slot, config, engine, port, api_key, gpus)
            begin = time.monotonic()
            progress(f"starting {engine.name}")
            problem = self._await_ready(slot, launch, config, engine, begin, progress)
            if problem is None:
                server = _describe(slot, launch, config, engine, api_key)
                progress(f"ready after {time.monotonic() - begin:.0f} s")
                return server, launch
            text = _text(launch.log)
            taken = diagnose(text, (Failure(_PORT_TAKEN, "", ""),))
            if taken is None or config.port is not None or attempt == _PORT_TRIES:
                raise ServerError(_failed(config, engine, problem, launch, _secret(api_key)))
            progress(f"port {port} was taken meanwhile")
        raise AssertionError("the loop above returns or raises")

    @contextmanager
    def _gpus(self, slot: _Slot, config: ServerConfig, progress: Progress) -> Iterator[Gpus]:
        """The GPUs for a server about to start, until its supervisor has them.

        Servers of this run that hold GPUs make room, the one not asked for the longest first;
        for those of other runs we wait, at most `ready_timeout`.
        """
        if config.gpus == 0:
            yield Gpus((), ())
            return
        known = visible_gpus()
        deadline = time.monotonic() + config.ready_timeout
        waiting = False
        while True:
            with taken(known, config.gpus) as gpus:
                if gpus is not None:
                    yield gpus
                    return
            if evicted := self._evict(slot):
                progress(f"{evicted} makes room on the GPU")
                continue
            if not waiting:
                progress("waiting for a GPU that another run holds")
                waiting = True
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{config.name} did not start: other test runs held the GPUs for "
                    f"{config.ready_timeout:g} s; wait for their end."
                )
            time.sleep(1.0)

    def _evict(self, keep: _Slot) -> str | None:
        """End one server of this run that holds a GPU; its name, None if there is none."""
        slots = [_Slot(folder) for folder in self._servers.iterdir() if folder.is_dir()]
        held = [slot for slot in slots if slot != keep and _read_json(slot.state).get("gpus")]
        for slot in sorted(held, key=lambda slot: slot.state.stat().st_mtime):
            lock = FileLock(slot.lock)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue  # somebody is just starting it again
            try:
                state = _read_json(slot.state)
                _terminate(_read_json(slot.status))
                _await_end(_read_json(slot.status))
                tree.sweep(state["server_id"])
                slot.state.unlink(missing_ok=True)
                return str(state["name"])
            finally:
                lock.release()
        return None

    def _launch(
        self,
        slot: _Slot,
        config: ServerConfig,
        engine: Engine,
        port: int,
        api_key: str | None,
        gpus: Gpus,
    ) -> _Launch:
        """Hand the server to a supervisor of its own. Nothing has been waited for yet."""
        server_id = f"llmserve-{secrets.token_hex(8)}"
        log = slot.new_log()
        slot.status.unlink(missing_ok=True)
        written = dict(engine.files(config))
        for name, text in written.items():
            slot.files.mkdir(exist_ok=True)
            (slot.files / name).write_text(text, encoding="utf-8")
        added = {tree.MARKER: server_id}
        if api_key:
            # An engine without a variable of its own is told its name by its command.
            added[engine.api_key or str(config.api_key_env)] = api_key
        stop: list[str] = []
        kill: list[str] = []
        if isinstance(config.runner, ContainerRunner):
            runtime = container.find_runtime(config.runner.runtime)
            container.make_mounts(config)
            added |= process.server_variables(config, engine, port)
            command = container.container_command(
                runtime,
                config,
                engine,
                port,
                name=server_id,
                variables=added,
                files=str(slot.files) if written else None,
                gpus=gpus.ids,
            )
            variables = os.environ | added
            stop = container.stop_command(runtime, server_id, config.stop_timeout)
            kill = container.kill_command(runtime, server_id)
        else:
            command = process.process_command(config, engine, port, str(slot.files))
            inherited = os.environ
            variables = process.process_environment(config, engine, port, inherited, gpus.ids)
            variables |= added
        guard = self._supervise(
            hold=gpus.files,
            argv=command,
            env=variables,
            cwd=str(Path.cwd()),
            log=str(log),
            status=str(slot.status),
            stop_timeout=config.stop_timeout,
            stop=stop,
            kill=kill,
        )
        return _Launch(guard, server_id, log, port, gpus.ids)

    def _supervise(self, **spec: Any) -> subprocess.Popen[bytes]:
        try:
            owner = os.pidfd_open(self._owner_pid)
        except ProcessLookupError:
            raise ServerError("pytest's main process has ended; no server is started.") from None
        except (AttributeError, OSError) as error:
            raise ServerError(
                f"This system cannot watch processes ({error}): servers are started on Linux 5.3 "
                "and newer only; start it yourself and give --llmserve-endpoint."
            ) from None
        try:
            with Path(spec["log"]).open("ab") as log:
                guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", supervisor.__file__],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(owner, *spec["hold"]),
                    start_new_session=True,
                )
            assert guard.stdin is not None
            with guard.stdin as pipe:
                pipe.write(json.dumps({**spec, "owner_fd": owner}).encode())
        finally:
            os.close(owner)
        self._guards.append(guard)
        return guard

    def _await_ready(
        self,
        slot: _Slot,
        launch: _Launch,
        config: ServerConfig,
        engine: Engine,
        begin: float,
        progress: Progress,
    ) -> str | None:
        """Wait until the server is ready; what went wrong in a few words if it will not be."""
        stages = engine.stages
        if isinstance(config.runner, ContainerRunner):
            stages = (*container.STAGES, *stages)
        follower = LogFollower(launch.log, stages)
        endpoint = _endpoint(config, launch.port)
        poll = select.poll()
        guard_fd = os.pidfd_open(launch.guard.pid)
        try:
            poll.register(guard_fd, select.POLLIN)
            while True:
                poll.poll(_LOOK * 1000)
                for stage in follower.new_stages():
                    progress(stage)
                status = _read_json(slot.status)
                if status.get("state") in ("ending", "ended") or launch.guard.poll() is not None:
                    return _how_it_ended(self._settled(slot.status))
                if ask(endpoint, engine.health, timeout=2).status == 200 and _is_ours(
                    status, launch.port, config
                ):
                    for stage in follower.new_stages():
                        progress(stage)
                    return None
                if late := _late(config, begin, follower.grown):
                    _terminate(_read_json(slot.status))
                    _await_end(_read_json(slot.status))
                    return late
        except BaseException:
            # Ctrl-C while it loads: nobody will know of this server, so it ends now.
            _terminate(_read_json(slot.status))
            raise
        finally:
            os.close(guard_fd)


def _describe(
    slot: _Slot, launch: _Launch, config: ServerConfig, engine: Engine, api_key: str | None
) -> Server:
    """The server that is ready, in its own words."""
    endpoint = _endpoint(config, launch.port)
    fetch = fetcher(endpoint, api_key)
    models = served_models(fetch("/v1/models"))
    wanted = config.served_model_name or config.model
    return Server(
        config=config,
        endpoint=endpoint,
        model=wanted if wanted in models or not models else models[0],
        engine=engine.name,
        version=engine.version(fetch),
        effective=engine.effective(fetch),
        emulated=engine.name == "emulator",
        pid=_read_json(slot.status).get("server"),
        log=str(launch.log),
        api_key=api_key,
    )


def _late(config: ServerConfig, begin: float, grown: float) -> str | None:
    """In what way a start takes too long: in all, or since its log last grew. None: it does not."""
    now = time.monotonic()
    if now - begin > config.ready_timeout:
        return f"{_NOT_READY} {config.ready_timeout:g} s (ready_timeout)"
    if config.stall_timeout is not None and now - grown > config.stall_timeout:
        return (
            f"{_NOT_READY} {now - begin:.0f} s, and its log said nothing new for "
            f"{config.stall_timeout:g} s (stall_timeout)"
        )
    return None


def _endpoint(config: ServerConfig, port: int) -> str:
    """Where we reach it: a server that listens everywhere is asked on loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_ours(status: dict[str, Any], port: int, config: ServerConfig) -> bool:
    """Whether it is our server that answers, not another one that took the port meanwhile."""
    if isinstance(config.runner, ContainerRunner):
        return True  # a daemon's container is not below us
    return "server" in status and listens(status["server"], port)


def _check(config: ServerConfig, findings: list[preflight.Finding], progress: Progress) -> None:
    """Tell it now if something is missing: that saves the minutes of a load that must fail."""
    for finding in findings:
        if finding.level == "fail":
            raise ServerError(f"{config.source or config.name}: {finding}.")
        if finding.level == "warn":
            progress(str(finding))


def _memory_back(config: ServerConfig, engine: Engine) -> list[preflight.Finding]:
    """The findings about memory, once what a server before this one had has been given back."""
    deadline = time.monotonic() + _MEMORY_BACK
    while True:
        findings = preflight.memory(config, engine)
        well = all(finding.level == "ok" for finding in findings)
        if well or time.monotonic() > deadline:
            return findings
        time.sleep(1.0)


def _failed(
    config: ServerConfig,
    engine: Engine,
    problem: str,
    launch: _Launch,
    secret: Callable[[str], str],
) -> str:
    """The whole message of a failed start: one sentence, the lines that prove it, the log."""
    text = _text(launch.log)
    tables = engine.failures
    if isinstance(config.runner, ContainerRunner):
        tables = (*tables, *container.FAILURES)
    found = None if _NOT_READY in problem else diagnose(text, (*tables, *_FAILURES))
    if found is None:
        lines = tuple((root_lines(text) or last_lines(text))[-5:])
        mend = (
            "raise it if the log shows progress"
            if _NOT_READY in problem
            else ("read the log" if lines else "run its command by hand to see why")
        )
        found = Diagnosis(f"it {problem}", mend, lines)
    name = f"{config.name} ({engine.name})"
    quoted = "".join(f"\n    {line}" for line in found.lines)
    return secret(
        f"{name} did not start: {found.cause}; {found.mend}.{quoted}\n  Log: {launch.log}"
    )


def _secret(api_key: str | None) -> Callable[[str], str]:
    """Takes the values of secrets out of a text that people will see."""
    telling = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    values = {v for name, v in os.environ.items() if any(t in name.upper() for t in telling)}
    values.add(api_key or "")

    def hidden(text: str) -> str:
        for value in values:
            if len(value) >= 8:
                text = text.replace(value, "***")
        return text

    return hidden


def _how_it_ended(status: dict[str, Any]) -> str:
    reason = status.get("reason", "")
    if reason.startswith("cannot execute"):
        return f"could not be run ({reason.removeprefix('cannot execute: ')})"
    if reason == "exited" and status.get("signal"):
        with suppress(ValueError):
            name = signal.Signals(status["signal"]).name
            return f"was killed by signal {status['signal']} ({name})"
    if reason == "exited":
        return f"ended by itself with exit code {status.get('code')}"
    if reason == "stopped":
        return "was stopped"
    if reason in ("guard", "keeper"):
        return "was ended because its supervisor was killed"
    return "is gone"


def _terminate(status: dict[str, Any]) -> None:
    """Ask the supervisor, if it is still there, to end its tree in order."""
    keeper = status.get("keeper")
    if keeper and _is_supervisor(keeper):
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGTERM)


def _await_end(status: dict[str, Any]) -> None:
    """Wait until keeper and guard are gone: nothing of the tree is left then.

    A keeper that does not come to its end is killed, and the guard does its work.
    """
    keeper, guard = status.get("keeper"), status.get("guard")
    if keeper and not _gone(keeper, _STOP_AT_MOST):
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)
    if guard:
        _gone(guard, _STOP_AT_MOST)


def _gone(pid: int, timeout: float) -> bool:
    """Wait at most `timeout` seconds for a supervisor process; whether it has ended."""
    if not _is_supervisor(pid):
        return True
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(fd)


def _is_supervisor(pid: int) -> bool:
    """Whether this process id still belongs to a supervisor: ids are used again."""
    with suppress(OSError):
        return supervisor.__file__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a slot; `waiting` is called once if somebody else has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_private(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        json.dump(content, file, default=str)
    fresh.replace(path)


_KEPT = ("endpoint", "model", "engine", "version", "effective", "emulated", "pid", "log", "api_key")


def _plain(server: Server) -> dict[str, Any]:
    return {name: getattr(server, name) for name in _KEPT}


def _server_from(state: dict[str, Any], config: ServerConfig) -> Server:
    return Server(config=config, **{name: state[name] for name in _KEPT})


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
