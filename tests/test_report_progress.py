"""Notes while a server starts and a load runs: seen, gone afterwards, and never garbled."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from terminal_screen import Screen, watch

#: Tests that show notes as a start and a load do, without either.
IMPORT = "from pytest_llmserve.report.progress import live"
NOTHING = "import contextlib; live = lambda *_: contextlib.nullcontext(lambda text: None)"
NOTES = f"""
import time
{IMPORT}

def show(config, times=3):
    with live(config, "starting x") as tell:
        for i in range(times):
            tell(f"{{9 - i}} s left · loading")
            time.sleep(0.05)

def test_first(pytestconfig):
    show(pytestconfig)

def test_bad(pytestconfig):
    show(pytestconfig)
    assert not "bad"

def test_last(pytestconfig):
    print("HEARD", end="")
    show(pytestconfig)
"""
LOAD = """
@quick
def test_it(load):
    load(closed_loop(users=2), duration=2.5, prompt_tokens=16, output_tokens=8, warmup=1)
"""
SOON = """
import pytest_llmserve.report.progress as progress
progress.FIRST, progress.EVERY = 0.2, 0.5
"""
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")


@pytest.mark.parametrize("arguments", [(), ("-v",), ("-q",), ("-s",), ("-v", "-s")])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_note_is_seen_on_a_terminal_and_leaves_nothing(pytester, arguments, width):
    pytester.makepyfile(test_notes=NOTES)
    status, text, seen = watch((*PYTEST, *arguments), pytester.path, width)
    assert status == 1
    assert any("starting x, 8 s left" in screen for screen in seen)
    assert "starting x" not in text.split("FAILURES")[0]
    assert all(len(line) <= width for line in text.splitlines())
    if "-s" in arguments:
        assert "HEARD" in text  # it was not written over
    elif width > 40:  # there is room beside what pytest writes, so that it looks as ever
        pytester.makepyfile(test_notes=NOTES.replace(IMPORT, NOTHING))
        _, plain, _ = watch((*PYTEST, *arguments), pytester.path, width)
        outcomes = re.compile(r"^test_notes.*$", re.MULTILINE)
        assert outcomes.findall(text) == outcomes.findall(plain)
        assert text.split("FAILURES")[0].count("\n") == plain.split("FAILURES")[0].count("\n")


def test_without_a_terminal_nothing_is_written_of_what_is_short(pytester):
    pytester.makepyfile(NOTES)
    result = pytester.runpytest_subprocess()
    assert "starting x" not in result.stdout.str().split("FAILURES")[0]
    assert "\x1b" not in result.stdout.str()


@pytest.mark.parametrize("arguments", [(), ("-v",), ("-s",)])
def test_without_a_terminal_a_line_says_now_and_then(pytester, arguments):
    pytester.makeconftest(SOON)
    pytester.makepyfile(NOTES.replace("times=3", "times=20"))
    result = pytester.runpytest_subprocess(*arguments)
    lines = result.stdout.str().splitlines()
    told = [line for line in lines if line.startswith("llmserve: starting x, ")]
    assert 3 <= len(told) <= 9
    assert all(re.fullmatch(r"llmserve: starting x, -?\d+ s left, loading, \d s", t) for t in told)
    assert "\x1b" not in result.stdout.str()
    quiet = pytester.runpytest_subprocess("-q")
    assert "starting x" not in quiet.stdout.str().split("FAILURES")[0]


def test_a_load_says_how_long_it_will_take(project):
    pytester = project(LOAD)
    status, text, seen = watch((*PYTEST, "-v"), pytester.path, 120)
    assert status == 0, text
    assert any("starting emulator, " in screen for screen in seen)
    found = [m for s in seen if (m := re.search(r"2 users, emulated, (\d) s left, load", s))]
    assert {int(match[1]) for match in found} >= {1, 2}
    assert "s left" not in text
    assert re.search(r"::test_it PASSED +\[100%\]", text)


HOLD = """
import time
from pytest_llmserve.launch.leases import lease
held = lease("load")
held.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_waiting_for_another_runs_load_is_said(project, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # locks that this test has for itself
    pytester = project("@quick\ndef test_it(llm_server): pass", {"conftest.py": SOON})
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    run = None
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        run = subprocess.Popen(
            PYTEST, cwd=pytester.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert run.stdout is not None
        said = next(line for line in run.stdout if "waiting for another load" in line)
        assert said.startswith("llmserve: waiting for another load on this machine to end")
        holder.kill()
        assert "1 passed" in run.stdout.read()
    finally:
        for process in filter(None, (holder, run)):
            process.kill()
            process.communicate()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_controller_shows_what_workers_are_at(project, terminal):
    pytest.importorskip("xdist")
    pytester = project(LOAD, {"conftest.py": SOON})
    if terminal:
        status, text, seen = watch((*PYTEST, "-n2"), pytester.path, 120)
        assert status == 0, text
        assert any(re.search(r"gw\d: 2 users, emulated, \d s left", screen) for screen in seen)
        assert "s left" not in text
    else:
        result = pytester.runpytest_subprocess("-n2")
        text = result.stdout.str()
        assert result.ret == 0
        result.stdout.re_match_lines([r"llmserve: gw\d: 2 users, emulated, \d s left, load, .*"])
    assert "llmserve: emulator: EMULATED engine" in text  # which servers, as without workers
    assert re.search(r"^\.\s+\[100%\]$", text, re.MULTILINE)


def test_the_screen_wraps_like_a_terminal():
    screen = Screen(4)
    screen.feed("ab\x1b7cd\x1b8\x1b[K")
    assert screen.text == "ab"
    screen.feed("cd\rx")
    assert screen.text == "xbcd"
    screen.feed("\r" + " " * 4 + "\ry")
    assert screen.text == "y"
    screen.feed("z" + " " * 4 + "\rw")
    assert screen.text.split("\n") == ["yz", "w"]
