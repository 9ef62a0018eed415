"""`llmserve serve`: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pytest_llmserve import cli

ROOT = Path(__file__).parent.parent
URL = re.compile(r"(http://127\.0\.0\.1:\d+)")


def heeds_interrupts() -> None:
    """Shells start background jobs, CI among them, with SIGINT ignored; children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def serving(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest_llmserve.cli", "serve", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        preexec_fn=heeds_interrupts,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(process: subprocess.Popen[str], what: str, within: float = 30.0) -> str:
    """What it says until a line has `what` in it."""
    assert process.stdout is not None
    text, end = "", time.monotonic() + within
    descriptor = process.stdout.fileno()
    while what not in text:
        left = end - time.monotonic()
        assert left > 0, f"it did not say {what!r}: {text}"
        if select.select([descriptor], [], [], left)[0]:
            piece = os.read(descriptor, 4096).decode()
            assert piece, f"it ended without {what!r}: {text}"
            text += piece
    return text


def completion(text: str, **body: object) -> dict:
    """Ask the server that `text` tells of, with the key that it tells of, if any."""
    url, key = URL.search(text), re.search(r"its API key is in (\S+)", text)
    assert url is not None
    data = json.dumps({"prompt": [1, 2, 3], "max_tokens": 5, **body}).encode()
    headers = {"Authorization": f"Bearer {Path(key[1]).read_text()}"} if key else {}
    request = urllib.request.Request(f"{url[1]}/v1/completions", data, headers)
    return json.load(urllib.request.urlopen(request, timeout=20))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_emulated_engine_serves_until_a_signal(tmp_path: Path, number: int) -> None:
    flags = ("--engine", "emulator", "--port", "0", "--model", "Qwen3 7B", "--schedule", "max-rate")
    with serving(tmp_path, *flags, "--served-model-name", "mine") as process:
        text = said(process, "Ready (emulated)")
        assert "EMULATED qwen3-8b on NVIDIA DGX Spark" in text
        answer = completion(text, model="mine")
        assert answer["usage"]["completion_tokens"] == 5
        process.send_signal(number)
        assert process.wait(timeout=20) == 0


def test_further_options_are_the_emulators(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--engine", "emulated", "--fault", "nonsense"]) == 2
    assert "'nonsense' is not known; use one of slow-start" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--engine", "emulator", "--", "--help"])
    assert ended.value.code == 0
    assert "--max-num-batched-tokens" in capsys.readouterr().out


def test_a_server_config_is_served_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    config = (ROOT / "suites/servers/qwen3-8b-nvfp4.yaml").read_text()
    (tmp_path / "servers/mine.yaml").write_text(config)
    with serving(tmp_path, "--server", "mine", "--engine", "emulator") as process:
        text = said(process, "Ctrl-C ends it")
        assert "EMULATED: no time it takes was measured on real hardware" in text
        log = re.search(r"its log is (\S+);", text)
        assert log is not None
        assert completion(text, model="Qwen3-8B")["usage"]["completion_tokens"] == 5
        tree = psutil.Process(process.pid).children(recursive=True)
        assert tree
        process.send_signal(signal.SIGINT)
        assert "ending" in said(process, "ending")
        assert process.wait(timeout=20) == 0
    _, alive = psutil.wait_procs(tree, timeout=5)
    assert not alive
    assert not Path(log[1]).exists(), "the run's folder is cleared up"


def test_a_server_that_ends_by_itself_is_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "engine: emulator\nmodel: Qwen3-8B\ngpus: 0\n"
        "emulation: {options: {fault: ['crash=tokens:3'], schedule: max-rate}}\n"
    )
    with serving(tmp_path, "--server", "mine.yaml") as process:
        text = said(process, "Ctrl-C ends it")
        with contextlib.suppress(ConnectionError, urllib.error.URLError):  # or it left before
            completion(text, model="Qwen3-8B")
        text = said(process, "SIGKILL")
        assert process.wait(timeout=20) == 2
    log = re.search(r"Its log: (\S+)", text)
    assert log is not None
    kept = Path(log[1].rstrip("."))
    assert "Ready (emulated)" in kept.read_text(), "the log that explains it is kept"


ATTACH = "engine: attach\nendpoint: http://127.0.0.1:1\n"
PLAIN = "engine: vllm\nmodel: none\nrunner: {process: {executable: ./no-such-vllm}}\ngpus: 0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --engine emulator, or --server NAME"),
        (["--engine", "vllm"], "give --engine emulator, or --server NAME"),
        (["--engine", "vlm"], "did you mean 'vllm'"),
        (["--server", "nowhere"], "There is no server config 'nowhere'"),
        (["--server", "attach"], "is of a server that runs already"),
        (["--server", "plain"], "no emulation section, and cannot run: no"),
        (["--server", "plain", "--engine", "emulator"], "no emulation section"),
        (["--server", "plain", "--engine", "sglang"], "plain is for vllm"),
        (["--server", "plain", "--port", "1"], "--port is not an option beside it"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers/attach.yaml").write_text(ATTACH)
    (tmp_path / "servers/plain.yaml").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, len(err.splitlines())) == ("", 1)
