"""A server for the tests of the launcher: real processes with every bad habit, and no model.

It answers /health, /version, /v1/models and /metrics, and writes the ids of all its processes
to a file, so that a test can see that none of them is left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--load-time", type=float, default=0.0)
    parser.add_argument("--say", action="append", default=[])
    parser.add_argument("--exit-code", type=int)
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--worker-bomb", action="store_true")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--first-port-taken", type=Path)
    parser.add_argument("--owned-by", default="fake")
    parser.add_argument("--metric", default="")
    options = parser.parse_args()

    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(options.pids)
    for number in range(options.workers):
        worker(options.pids, deep=number % 2 == 1)
    if options.worker_bomb:
        bomb(options.pids)
    for line in options.say:
        print(line, flush=True)
    time.sleep(options.load_time)
    if options.exit_code is not None:
        sys.exit(options.exit_code)
    if options.first_port_taken and not options.first_port_taken.exists():
        options.first_port_taken.touch()
        raise OSError(98, "Address already in use")
    serve(options)


def note(pids: Path) -> None:
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")


def worker(pids: Path, *, deep: bool) -> None:
    """A child in a session of its own that ignores SIGTERM; `deep`: re-parented and without the
    environment of its parents, as a program that overwrites it for its title has none."""
    if os.fork():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()
    if deep:
        if os.fork():
            os._exit(0)
        code = (
            "import os, signal, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"open({str(pids)!r}, 'a').write(str(os.getpid()) + '\\n')\n"
            "time.sleep(600)"
        )
        os.execve(sys.executable, [sys.executable, "-S", "-c", code], {})
    note(pids)
    time.sleep(600)
    os._exit(0)


def bomb(pids: Path) -> None:
    """Eight chains that fork a successor over and over: never the same ids twice."""
    for _ in range(8):
        if os.fork() == 0:
            os.setsid()
            for _ in range(100_000):
                if os.fork():
                    time.sleep(0.05)
                    os._exit(0)
            os._exit(0)
    note(pids)


class Handler(BaseHTTPRequestHandler):
    options: argparse.Namespace

    def do_GET(self) -> None:
        known = {
            "/health": "" if not self.options.never_ready else None,
            "/version": json.dumps({"version": "1.2.3"}),
            "/metrics": f"{self.options.metric} 1\n",
            "/v1/models": json.dumps(
                {"object": "list", "data": [{"id": "tiny", "owned_by": self.options.owned_by}]}
            ),
        }
        body = known.get(self.path.partition("?")[0])
        wanted = os.environ.get("FAKE_API_KEY")
        told = self.headers.get("Authorization")
        if wanted and self.path.startswith("/v1/") and told != f"Bearer {wanted}":
            self.send_response(401)
            body = ""
        else:
            self.send_response(200 if body is not None else 503)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, *_: object) -> None:
        pass


def serve(options: argparse.Namespace) -> None:
    Handler.options = options
    ThreadingHTTPServer.allow_reuse_address = False
    ThreadingHTTPServer.address_family = socket.AF_INET
    print("opening the port", flush=True)
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
