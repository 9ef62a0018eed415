"""Keeps one server tree, and ends all of it: a small program of its own, standard library only.

    python -I -S supervisor.py < SPEC

Two processes, each a child subreaper (prctl(2)), so that no descendant can leave the tree by
re-parenting, by a session of its own or by changing its environment:

    starter (pytest) ── guard ── keeper ── server ── its workers …

The keeper starts the server and waits for the first of: the server's end, SIGTERM, the end of
the owner (seen by a pidfd, so also after SIGKILL), the end of the guard. Whichever it is, it ends
the whole tree. The guard waits for the keeper only: should that be killed, the tree falls to
the guard, which ends it. The server itself dies with the keeper (PR_SET_PDEATHSIG). Only if
both are killed at the same instant can a worker stay; `tree.sweep` finds it by its marker.

SPEC is JSON: `argv` `env` `cwd` `log` `status` (files) `stop_timeout` (seconds) `owner_fd` (a
pidfd, inherited), `hold` (descriptors of locks, inherited, kept until the tree is gone), and
`stop` and `kill`, commands that end what is not below us (a container of a daemon) gently and at
once. It comes by standard input because environments hold secrets.

The status file, replaced at each change, is JSON: `state` (running, ending, ended), `keeper`,
`guard`, `server` (process ids) and, from `ending` on, `reason` (exited, stopped, owner, guard,
keeper, or `cannot execute: …`), `code`, `signal` and `left` (ids that would not die).
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is not worth its import time here
    from typing import Any

    Spec = dict[str, Any]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Seconds. After the server has left its workers get this long to follow it, or its stop_timeout
# if that is shorter.
_LINGER = 2.0
# When the owner was killed nobody waits for an orderly end any more.
_OWNER_GONE = 2.0
# A container runtime may take this long over a command before the tree is killed anyway.
_COMMAND = 10.0
# A process that survives SIGKILL for this long hangs in the kernel; it is reported.
_UNKILLABLE = 30.0


def main() -> int:
    spec: Spec = json.load(sys.stdin)
    for fd in (spec["owner_fd"], *spec["hold"]):
        os.set_inheritable(fd, False)  # for us two, not for the server
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Terminals and impatient users signal the starter; what happens to the tree is decided here.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    guard_fd = os.pidfd_open(os.getpid())
    keeper = os.fork()
    if keeper == 0:
        os._exit(_keep(spec, libc, os.getppid(), guard_fd))
    os.close(guard_fd)
    return _guard(spec, keeper)


def _guard(spec: Spec, keeper: int) -> int:
    """Wait for the keeper; if it did not get to its end, do its work."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(keeper, signal.SIGTERM))
    ended: dict[int, int] = {}
    while keeper not in ended:
        pid, status = os.wait()
        ended[pid] = status
    if ended[keeper] != 0:
        _run(spec["kill"], _COMMAND, ended)
        left = kill_descendants(ended)
        _write(
            spec["status"],
            state="ended",
            reason="keeper",
            code=None,
            signal=int(signal.SIGKILL),
            left=left,
            keeper=keeper,
            guard=os.getpid(),
        )
    return 0


def _keep(spec: Spec, libc: ctypes.CDLL, guard: int, guard_fd: int) -> int:
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # fork(2) does not hand it on
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(wakeup_end, False)
    signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
    terminated: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken up

    server, problem = _start(spec, libc)
    facts: dict[str, object] = {"keeper": os.getpid(), "guard": guard, "server": server}
    if problem:
        os.waitpid(server, 0)
        facts |= {"reason": problem, "code": 127, "signal": None, "left": []}
        _write(spec["status"], state="ended", **facts)
        return 0
    _write(spec["status"], state="running", **facts)

    ended: dict[int, int] = {}
    poll = select.poll()
    for fd in (wakeup, guard_fd, spec["owner_fd"]):
        poll.register(fd, select.POLLIN)
    reason = ""
    while not reason:
        ready = {fd for fd, _ in poll.poll()}
        _drain(wakeup)
        _reap(ended)
        if server in ended:
            reason = "exited"
        elif terminated:
            reason = "stopped"
        elif spec["owner_fd"] in ready:
            reason = "owner"
        elif guard_fd in ready:
            reason = "guard"

    facts |= {"reason": reason, **_how(ended.get(server))}
    _write(spec["status"], state="ending", **facts)
    if reason == "stopped":
        _run(spec["stop"], spec["stop_timeout"] + _COMMAND, ended)
    _run(spec["kill"], _COMMAND, ended)
    if reason != "exited":
        _signal(server, signal.SIGTERM)
        _wait(server, spec["stop_timeout"] if reason == "stopped" else _OWNER_GONE, ended)
    linger = min(_LINGER, spec["stop_timeout"]) if reason in ("exited", "stopped") else 0.0
    _wait_for_all(linger, ended)
    left = kill_descendants(ended)
    facts |= {"left": left, **_how(ended.get(server))}
    _write(spec["status"], state="ended", **facts)
    return 0


def _start(spec: Spec, libc: ctypes.CDLL) -> tuple[int, str]:
    """Fork and exec the server in a session of its own; its id, and why it could not be run."""
    keeper = os.getpid()
    told, tell = os.pipe()  # a successful exec closes it
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    server = os.fork()
    if server == 0:
        try:
            os.setsid()
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            # Ignored signals stay ignored over exec: give the server the usual ones back.
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_DFL)
            os.dup2(nothing, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(spec["cwd"])
            os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
        except BaseException as error:  # nothing may get out of a forked child but this sentence
            os.write(tell, f"cannot execute: {error}".encode())
        os._exit(127)
    for fd in (tell, log, nothing):
        os.close(fd)
    with os.fdopen(told) as pipe:
        return server, pipe.read()


def _run(command: list[str], timeout: float, ended: dict[int, int]) -> None:
    """Run a command of a container runtime to its end, in silence; it may well fail."""
    if not command:
        return
    child = os.fork()
    if child == 0:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    if not _wait(child, timeout, ended):
        _signal(child, signal.SIGKILL)
        _wait(child, 1.0, ended)


def _reap(ended: dict[int, int]) -> None:
    """Collect the wait statuses of children that have ended; orphans of the tree are children."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended[pid] = status


def _wait(child: int, timeout: float, ended: dict[int, int]) -> bool:
    """Wait at most `timeout` seconds for a child; whether it has ended."""
    _reap(ended)
    if child in ended:
        return True
    fd = os.pidfd_open(child)  # not reaped yet, so it is there
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout
    while child not in ended and (left := deadline - time.monotonic()) > 0:
        poll.poll(left * 1000)
        _reap(ended)
    os.close(fd)
    return child in ended


def _wait_for_all(timeout: float, ended: dict[int, int]) -> None:
    """Let what is left of the tree end by itself, for `timeout` seconds at most."""
    deadline = time.monotonic() + timeout
    while descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.02)
        _reap(ended)


def kill_descendants(ended: dict[int, int]) -> list[int]:
    """SIGKILL everything below this process until nothing is left; ids that would not die.

    All are stopped before the first is killed, so that none can fork faster than we count.
    """
    me = os.getpid()
    deadline = time.monotonic() + _UNKILLABLE
    while True:
        stopped: set[int] = set()
        while fresh := set(descendants(me)) - stopped:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            _signal(pid, signal.SIGKILL)
        _reap(ended)
        left = descendants(me)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.005)


def descendants(root: int) -> list[int]:
    """All processes below `root`, zombies too, from one look at /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                    stat = file.read()
            except OSError:
                continue
            # pid (comm) state ppid …, where comm may hold spaces and brackets
            parent = int(stat[stat.rindex(b")") + 2 :].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = list(children.get(root, ()))
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, ())
    return found


def _how(status: int | None) -> dict[str, int | None]:
    """A wait status as exit code and signal."""
    exited = status is not None and os.WIFEXITED(status)
    killed = status is not None and os.WIFSIGNALED(status)
    return {
        "code": os.WEXITSTATUS(status) if exited and status is not None else None,
        "signal": os.WTERMSIG(status) if killed and status is not None else None,
    }


def _signal(pid: int, number: int) -> None:
    try:  # noqa: SIM105 - contextlib is not imported here
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        pass


def _write(path: str, **content: object) -> None:
    """Replace the status file in one step: readers see the old or the new one, never half."""
    fresh = f"{path}.new"
    try:
        with open(fresh, "w") as file:  # noqa: PTH123
            json.dump(content, file)
        os.replace(fresh, path)  # noqa: PTH105
    except OSError:
        pass  # the run's folder is gone, and with it everyone who could read it


if __name__ == "__main__":
    sys.exit(main())
