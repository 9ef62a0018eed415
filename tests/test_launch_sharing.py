"""Workers and separate runs share a machine: one server a config, one load at a time, no GPU twice.

All processes are real. There is no GPU where this is tested: a program named nvidia-smi lists two.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.launching import living, soon

pytest.importorskip("xdist")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two GPUs, and a folder of locks that no other tests of this machine use."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$1" = -L ] && printf "GPU 0: A (UUID: a)\\nGPU 1: A (UUID: b)\\n"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def started(request):
    """Starts `pytest` on its own in a folder; what a test leaves running is ended."""
    running = []

    def start(folder, *words):
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *words],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


EACH_VERDICT = """
import os, signal, threading
other = pytest.mark.llmserve(
    engine="emulator", model="another",
    emulation={"hardware": "h100", "model": "qwen3-1.7b", "weights": "bf16", "kv": "bf16"})
def measured(load): return load(closed_loop(users=2), **SHORT)
@quick
def test_passes(load, slo): slo.check(measured(load), at_least("output_throughput", 1))
@other
def test_passes_elsewhere(load, slo): slo.check(measured(load), at_least("output_throughput", 1))
@quick
def test_fails(load, slo): slo.check(measured(load), at_least("output_throughput", 1e9))
@quick
def test_has_no_baseline(load, baseline): baseline.check(measured(load))
@other
def test_server_ends(llm_server, load):
    threading.Timer(0.5, os.kill, (llm_server.pid, signal.SIGKILL)).start()
    load(closed_loop(users=1), duration=30)
@other
def test_next_finds_another_server(load, slo):
    slo.check(measured(load), at_least("output_throughput", 1))
def test_that_serves_nothing(): pass
"""


def test_four_workers_give_the_same_verdicts_as_none(project):
    pytester = project(EACH_VERDICT)
    told = []
    for workers in ("0", "4"):
        result = pytester.runpytest_subprocess(f"-n{workers}", f"--llmserve-json={workers}.json")
        outcomes = result.parseoutcomes()
        outcomes.pop("warnings", None)
        tests = json.loads((pytester.path / f"{workers}.json").read_text())["runs"]
        verdicts = {(t["test"], t["verdict"]) for t in tests}
        told.append((outcomes, verdicts, result.ret))
    assert told[0] == told[1]
    outcomes, verdicts, _ = told[0]
    assert outcomes == {"passed": 4, "failed": 1, "errors": 1, "inconclusive": 1}
    assert {verdict for _, verdict in verdicts} == {"pass", "fail", "inconclusive", "invalid"}
    # A worker saw the server end; the controller keeps the log that says why.
    (line,) = [line for line in result.outlines if line.startswith("invalid: server_alive")]
    assert "the server ended during the load: emulator was killed by signal 9 (SIGKILL)" in line
    assert "Listening on" in Path(line.rpartition("Its log: ")[2]).read_text()


def two_runs(project, body):
    """Two folders with the same tests, beside each other, for two runs of pytest."""
    pytester = project(body)
    (test,) = pytester.path.glob("test_*.py")
    folders = [pytester.path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / test.name).write_text(test.read_text())
        (folder / "pytest.ini").write_text("[pytest]\n")
    test.unlink()
    return folders


TWO_RUNS = """
import pathlib, time
def meet(word):
    '''Wait until both runs have come here.'''
    pathlib.Path(word).touch()
    end = time.monotonic() + 60
    while not all(pathlib.Path("..", run, word).exists() for run in ("one", "two")):
        assert time.monotonic() < end, "the other run does not come"
        time.sleep(0.02)
"""


def test_loads_of_two_runs_with_workers_never_overlap(project, machine, started):
    body = TWO_RUNS + (
        "meet('collected')\n"
        "@quick\n"
        "@pytest.mark.parametrize('number', range(2))\n"
        "def test_loads(llm_server, load, number):\n"
        "    begin = time.monotonic()\n"
        "    load(closed_loop(users=1), duration=0.3, prompt_tokens=16, output_tokens=8)\n"
        "    with open('../loads', 'a') as file:\n"
        "        file.write(f'{pathlib.Path.cwd().name} {begin} {time.monotonic()}\\n')\n"
    )
    folders = two_runs(project, body)
    runs = [started(folder, "-n2") for folder in folders]
    for run in runs:
        text, _ = run.communicate(timeout=100)
        assert (folders[0].parent / "loads").exists(), text
    rows = [line.split() for line in (folders[0].parent / "loads").read_text().splitlines()]
    loads = sorted((float(begin), float(end), name) for name, begin, end in rows)
    assert [name for *_, name in loads].count("one") == 2
    assert [name for *_, name in loads].count("two") == 2
    assert all(one[1] <= two[0] for one, two in pairwise(loads)), loads


def test_a_run_that_is_killed_under_load_does_not_hold_up_the_next(project, machine, started):
    folders = two_runs(
        project,
        "import pathlib\n"
        "@quick\n"
        "def test_it(llm_server, load):\n"
        "    pathlib.Path('up').write_text(str(llm_server.pid))\n"
        "    long = pathlib.Path.cwd().name == 'one'\n"
        "    load(closed_loop(users=2), duration=100 if long else 0.3, output_tokens=8)\n",
    )
    first = started(folders[0])
    assert soon((folders[0] / "up").exists, within=30)
    second = started(folders[1])
    assert not soon((folders[1] / "up").exists, within=3), "it waits for the first"
    first.send_signal(signal.SIGKILL)
    text, _ = second.communicate(timeout=60)
    assert (folders[1] / "up").exists(), text
    assert not living({int((folders[0] / "up").read_text())})


def test_workers_and_runs_have_gpus_of_their_own(project, machine, started):
    body = TWO_RUNS + (
        "served = pytest.mark.llmserve(engine='emulator', model=pathlib.Path.cwd().name, gpus=1,\n"
        "    emulation={'hardware': 'h100', 'model': 'qwen3-0.6b', 'weights': 'bf16', "
        "'kv': 'bf16'})\n"
        "def gpus_of(pid):\n"
        "    words = pathlib.Path(f'/proc/{pid}/environ').read_text().split('\\0')\n"
        "    return dict(w.split('=', 1) for w in words if w)['CUDA_VISIBLE_DEVICES']\n"
        "@served\n"
        "def test_serves(llm_server):\n"
        "    with open('gpus', 'a') as file: file.write(gpus_of(llm_server.pid) + '\\n')\n"
        "@served\n"
        "def test_serves_again(llm_server): test_serves(llm_server)\n"
        "def test_other_run_has_its_server_too(): meet('served')\n"
    )
    folders = two_runs(project, body)
    runs = [started(folder, "-n2") for folder in folders]
    for run in runs:
        text, _ = run.communicate(timeout=100)
        assert run.returncode == 0, text
    told = [(folder / "gpus").read_text().split() for folder in folders]
    assert [len(gpus) for gpus in told] == [2, 2]
    assert {len(set(gpus)) for gpus in told} == {1}, "both workers of a run use one server"
    assert {told[0][0], told[1][0]} == {"0", "1"}
