"""What goes wrong outside the tests' own code is one clear sentence, a non-zero exit, no orphan."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator

import pytest

ASK = """
@pytest.mark.llmserve(server="it")
def test_it(llm_server, load): load(closed_loop(users=1), **SHORT)
"""


def _clear(result: pytest.RunResult, *sentences: str) -> None:
    text = result.stdout.str() + result.stderr.str()
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text
    assert "During handling" not in text
    assert "fixtures.py" not in text
    for sentence in sentences:
        assert sentence in text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("engine: [vllm", ("servers/it.yaml", "line")),
        ("model: x", ("servers/it.yaml", "engine")),
        ("engine: warp\nmodel: x", ("warp", "vllm")),
        ("engine: emulator\nmodel: x\nportt: 1", ("servers/it.yaml", "portt")),
        ("engine: emulator\nmodel: x\ngpus: many", ("servers/it.yaml", "gpus")),
        ("!!python/object/apply:os.system ['true']", ("servers/it.yaml",)),
        ("", ("servers/it.yaml",)),
    ],
)
def test_a_bad_server_config_is_a_usage_error(project, text, sentences):
    result = project(ASK, {"servers/it.yaml": text}).runpytest()
    assert result.ret == 4
    _clear(result, *sentences)


def _dying(pytester: pytest.Pytester, lines: str, status: int) -> None:
    script = pytester.path / "engine.py"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.stderr.write({lines!r})\nsys.exit({status})\n"
    )
    script.chmod(0o755)


def test_a_server_that_dies_while_loading_is_diagnosed(project):
    config = """
engine: vllm
model: some/model
gpus: 0
runner: {process: {executable: ./engine.py}}
"""
    pytester = project(ASK, {"servers/it.yaml": config.replace("./engine", "../engine")})
    log = "INFO loading\nValueError: Free memory on device (1/80 GiB) is less than desired GPU\n"
    _dying(pytester, log, 1)
    result = pytester.runpytest("--llmserve-engine=vllm")
    assert result.ret == 1
    result.assert_outcomes(errors=1)
    _clear(result, "Free memory on device", "gpu-memory-utilization", ".log")


def test_an_executable_that_is_not_there_is_named(project):
    config = "engine: vllm\nmodel: m\ngpus: 0\nrunner: {process: {executable: /no/such/vllm}}"
    result = project(ASK, {"servers/it.yaml": config}).runpytest("--llmserve-engine=vllm")
    assert result.ret == 1
    _clear(result, "/no/such/vllm")


class Breaking(http.server.BaseHTTPRequestHandler):
    """A server whose streams break off after one event."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = {"object": "list", "data": [{"id": "m", "object": "model"}]}
        self._json(body if self.path == "/v1/models" else {}, 200 if "models" in self.path else 404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("completions"):
            self._json({}, 404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        event = b'data: {"choices": [{"index": 0, "text": "a", "delta": {"content": "a"}}]}\n\n'
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.close_connection = True

    def _json(self, body: object, status: int) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def breaking() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_stream_that_breaks_makes_the_run_invalid(project, breaking):
    result = project(ASK).runpytest(f"--llmserve-endpoint={breaking}")
    assert result.ret == 1
    result.assert_outcomes(errors=1)
    _clear(result, "invalid:", "truncated")


def test_a_server_that_dies_under_load_makes_the_run_invalid(project):
    body = """
import os, signal, threading
@quick
def test_it(llm_server, load):
    threading.Timer(1.0, os.kill, (llm_server.pid, signal.SIGKILL)).start()
    load(closed_loop(users=2), duration=20)
"""
    result = project(body).runpytest_subprocess(timeout=60)
    assert result.ret == 1
    _clear(result, "invalid:", "server")


COMPARE = """
@quick
def test_it(load, baseline):
    baseline.check(load(closed_loop(users=1), **SHORT), metrics=["output_throughput"])
"""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "llmserve-baseline/99"}', "\x00\xff", "[" * 9999]
)
def test_a_broken_baseline_file_is_named_and_left_alone(project, text):
    pytester = project(COMPARE)
    assert pytester.runpytest("--llmserve-update-baselines=new").ret == 0
    (path,) = (pytester.path / "baselines").rglob("*.json")
    path.write_text(text)
    result = pytester.runpytest("--llmserve-update-baselines=all")
    assert result.ret == 1
    _clear(result, path.name)
    assert path.read_text() == text


def test_what_cannot_be_is_a_sentence_and_the_line_it_is_about(project):
    """An error that says all there is to say is shown without the frames it went through."""
    pytester = project(
        """
@quick
@pytest.mark.parametrize("wrong", [
    lambda load: load(closed_loop(users=0)),
    lambda load: load(open_loop(rate=float("nan"))),
    lambda load: at_least("no_such_thing", 1),
])
def test_it(load, wrong):
    wrong(load)

def test_of_someone_else():
    raise ValueError("as it is")
"""
    )
    result = pytester.runpytest()
    result.assert_outcomes(failed=4)
    text = result.stdout.str()
    name = "test_what_cannot_be_is_a_sentence_and_the_line_it_is_about.py"
    assert f"{name}:10: closed_loop(users=0): users must be a whole number" in text
    assert f"{name}:11: open_loop(rate=nan): rate must be positive" in text
    assert f"{name}:12: at_least('no_such_thing', 1): no metric" in text
    assert "plan.py" not in text
    assert "slo.py" not in text
    assert '>       raise ValueError("as it is")' in text


def test_what_cannot_be_in_a_module_is_a_sentence(project):
    pytester = project('LIMIT = at_most("ttft.p94", 1)\ndef test_it(): pass')
    result = pytester.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*.py:7: at_most('ttft.p94', 1): no metric*did you mean*"])
    assert "slo.py" not in result.stdout.str()
