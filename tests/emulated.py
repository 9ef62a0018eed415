"""An emulator process of its own for a test, and a plain client to talk to it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Emulated:
    process: subprocess.Popen[str]
    host: str
    port: int = 0
    log: list[str] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=20)

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of one request; a body that is not bytes goes as JSON."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, named)
        answer = connection.getresponse()
        try:
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None, **headers: str) -> Any:
        return json.loads(self.ask(path, body, **headers)[2])

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The lines of a stream that are not empty, raw."""
        status, _, data = self.ask(path, {**body, "stream": True})
        assert status == 200, data
        return [line for line in data.decode().split("\n") if line]

    def chunks(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The decoded events of a stream that ended with [DONE]."""
        lines = [line for line in self.events(path, body) if line.startswith("data:")]
        assert lines[-1].strip() == "data: [DONE]"
        return [json.loads(line[5:]) for line in lines[:-1]]

    def metrics(self, path: str = "/metrics") -> dict[str, float]:
        """Samples by name, labels dropped (those that differ only in labels are added)."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.ask(path)[2].decode()):
            for sample in family.samples:
                if "le" not in sample.labels:
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


@contextmanager
def emulated(*flags: str, host: str = "127.0.0.1", wait_for: str = "Ready") -> Iterator[Emulated]:
    """A running emulator, ended with SIGTERM (and, if that fails, SIGKILL)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest_llmserve.emulator", "--host", host, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Emulated(process, host)
    ready = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line.rstrip())
            if "Listening on" in line:
                server.port = int(line.rsplit(":", 1)[1])
            if wait_for in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        assert ready.wait(20), server.log
        assert any(wait_for in line for line in server.log), server.log
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
