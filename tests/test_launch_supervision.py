"""Whatever is killed, nothing of a server stays: neither a process nor its port.

The fake server's workers have sessions of their own, ignore SIGTERM, and half of them are
re-parented and have an empty environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_llmserve.launch import supervisor, tree
from pytest_llmserve.launch.manager import ServerManager
from tests.launching import answers, cleaned, fake_config, fake_engine, living, pids_in, soon

ROOT = Path(__file__).parents[1]

OWNER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from pytest_llmserve.launch.manager import ServerManager
from tests.launching import fake_config, fake_engine
manager = ServerManager(Path({run!r}), os.getpid())
config = fake_config(Path({pids!r}), args={args!r}, stop_timeout={stop_timeout!r})
server = manager.get(config, fake_engine(), lambda _: None)
print(server.endpoint, flush=True)
sys.stdin.readline()  # until the test has seen all processes
{then}
"""


@pytest.fixture
def pids(tmp_path):
    yield from cleaned(tmp_path / "pids")


@pytest.fixture
def manager(tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    yield manager
    manager.stop_all()


@pytest.fixture
def owned(tmp_path, pids):
    """Starts a server in a process that plays pytest; gives that process and the server's port."""
    owners = []

    def start(then="time.sleep(600)", workers=4, stop_timeout=30.0, **args):
        code = OWNER.format(
            root=str(ROOT),
            run=str(tmp_path / "run"),
            pids=str(pids),
            args={"workers": workers, **args},
            stop_timeout=stop_timeout,
            then=then,
        )
        owner = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        owners.append(owner)
        port = int(owner.stdout.readline().rpartition(":")[2])
        assert soon(lambda: len(pids_in(pids)) == workers + 1)
        assert living(pids_in(pids)) == pids_in(pids)
        owner.stdin.write("\n")
        owner.stdin.flush()
        return owner, port

    yield start
    for owner in owners:
        owner.kill()
        owner.communicate()


def supervisors(folder):
    (status,) = folder.rglob("status.json")
    known = json.loads(status.read_text())
    return known["keeper"], known["guard"]


def gone(pids, port, folder):
    everybody = pids_in(pids) | set(supervisors(folder))
    return soon(lambda: not living(everybody) and not answers(port))


@pytest.mark.parametrize("ignore_term", [False, True])
def test_sigkill_of_the_owner(owned, pids, tmp_path, ignore_term):
    owner, port = owned(**{"ignore-term": ignore_term or None})
    owner.send_signal(signal.SIGKILL)
    assert gone(pids, port, tmp_path)


@pytest.mark.parametrize(
    "then",
    [
        "os._exit(0)",
        "raise SystemExit(3)",
        "raise KeyboardInterrupt",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os.abort()",
    ],
)
def test_any_other_end_of_the_owner(owned, pids, tmp_path, then):
    _, port = owned(then, workers=2)
    assert gone(pids, port, tmp_path)


@pytest.mark.parametrize("which", [0, 1], ids=["keeper", "guard"])
def test_sigkill_of_a_supervisor(owned, pids, tmp_path, which):
    _, port = owned()
    os.kill(supervisors(tmp_path)[which], signal.SIGKILL)
    assert gone(pids, port, tmp_path)


def test_sigkill_of_both_supervisors_is_mended_by_the_marker(manager, pids):
    config = fake_config(pids, args={"workers": 3})  # the third worker has no marker
    server = manager.get(config, fake_engine(), lambda _: None)
    assert soon(lambda: len(pids_in(pids)) == 4)
    status = json.loads((Path(server.log).parent / "status.json").read_text())
    environment = Path(f"/proc/{server.pid}/environ").read_text()
    (server_id,) = [w[len(tree.MARKER) + 1 :] for w in environment.split("\0") if tree.MARKER in w]
    assert len(tree.marked(server_id)) == 3
    for pid in (status["guard"], status["keeper"]):
        os.kill(pid, signal.SIGSTOP)
    for pid in (status["guard"], status["keeper"]):
        os.kill(pid, signal.SIGKILL)
    assert soon(lambda: not manager.alive(server)), "the server dies with its keeper"
    manager.stop_all()
    assert not tree.marked(server_id)


def test_sigkill_of_the_server_takes_its_workers(owned, pids, tmp_path):
    _, port = owned(stop_timeout=0.3)
    (server,) = [
        pid for pid in pids_in(pids) if os.getpgid(pid) == pid and _parent(pid) == keeper(tmp_path)
    ]
    os.kill(server, signal.SIGKILL)
    assert gone(pids, port, tmp_path)


def keeper(folder):
    return supervisors(folder)[0]


def _parent(pid):
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def test_server_that_ignores_sigterm_is_killed_after_its_time(manager, pids):
    config = fake_config(pids, args={"ignore-term": True, "workers": 2}, stop_timeout=0.5)
    manager.get(config, fake_engine(), lambda _: None)
    begin = time.monotonic()
    manager.stop_all()
    assert time.monotonic() - begin >= 0.5, "it was given its time"
    assert not living(pids_in(pids))


def test_fork_bomb_of_workers(manager, pids):
    server = manager.get(fake_config(pids, args={"worker-bomb": True}), fake_engine(), print)
    status = json.loads((Path(server.log).parent / "status.json").read_text())
    assert soon(lambda: len(supervisor.descendants(status["guard"])) > 5)
    # A process of the bomb may have ended when it is asked for its session; its successor has it.
    sessions = {_session(pid) for pid in supervisor.descendants(status["keeper"])} - {None}
    assert sessions
    manager.stop_all()
    assert not living({status["guard"], status["keeper"]})
    left = [pid for pid in map(int, _numbers()) if _session(pid) in sessions]
    assert not living(set(left))


def _numbers():
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_orderly_stop_lets_the_server_finish(manager, tmp_path):
    """A server that tidies up on SIGTERM gets the time to."""
    script = tmp_path / "tidy.py"
    script.write_text(
        "import signal, sys, time\n"
        "from http.server import *\n"
        "def tidy(*_):\n"
        "    time.sleep(0.5)\n"
        f"    open({str(tmp_path / 'tidied')!r}, 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, tidy)\n"
        "class H(BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    engine = fake_engine(
        command=lambda config, port: [str(script), str(port)],
        version=lambda fetch: "",
        effective=lambda fetch: {},
    )
    config = fake_config(tmp_path / "none", stop_timeout=20.0)
    server = manager.get(config, engine, lambda _: None)
    manager.stop_all()
    assert (tmp_path / "tidied").exists()
    status = json.loads((Path(server.log).parent / "status.json").read_text())
    assert (status["reason"], status["code"]) == ("stopped", 0)


def test_interrupt_while_loading_leaves_nothing(manager, pids):
    def interrupt(stage):
        if stage == "opening":
            raise KeyboardInterrupt

    config = fake_config(pids, args={"never-ready": True, "workers": 2})
    with pytest.raises(KeyboardInterrupt):
        manager.get(config, fake_engine(), interrupt)
    assert soon(lambda: not living(pids_in(pids)))


def test_supervisor_is_light():
    """It starts with each server and lives as long, so it imports next to nothing."""
    code = f"import runpy, sys; runpy.run_path({supervisor.__file__!r}); print(len(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) < 90
