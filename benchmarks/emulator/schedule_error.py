"""How well the emulator keeps its schedule, beside a client that reads: a markdown table.

    python benchmarks/emulator/schedule_error.py [--users 30] [--rate 50] [--seconds 20]

The emulator runs in a process of its own and logs when each token was due and when it left; this
process is the client, and reads every stream. Nothing of the client's view goes into the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pytest_llmserve.emulator.truth import Event, read_truth


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--users", type=int, default=30)
    options.add_argument("--rate", type=float, default=50.0, help="tokens/s of one user")
    options.add_argument("--seconds", type=float, default=20.0)
    given = options.parse_args()
    tokens = round(given.seconds * given.rate)
    tpot = 1 / given.rate
    print(
        f"{given.users} users x {given.rate:g} tokens/s, {given.seconds:g} s; {os.cpu_count()} "
        f"cores, Linux {platform.release()}, Python {platform.python_version()}, load average "
        f"before {os.getloadavg()[0]:.1f}\n"
    )
    print("| schedule | events | left late p50 | p90 | p99 | p99.9 | max | in the kernel p99 |")
    print("|---|---|---|---|---|---|---|---|")
    modes = {
        "exact": ["--schedule", "exact", "--ttft", "0.2", "--tpot", repr(tpot)],
        "batched (DGX Spark)": ["--max-num-seqs", str(given.users)],
    }
    for name, flags in modes.items():
        events = emitted(flags, given.users, tokens, tpot)
        print(f"| {name} | {cells(events)} |", flush=True)
    # A step's tokens leave one after the other, as a real engine's do: the first shows the clock.
    first = {event.due: event for event in sorted(events, key=lambda e: -e.before)}
    print(f"| batched, first token of each step | {cells(list(first.values()))} |", flush=True)
    events = emitted(["--schedule", "max-rate"], given.users, 10 * tokens, 0)
    span = max(event.after for event in events) - min(event.before for event in events)
    print(f"\nmax-rate: {len(events) / span:,.0f} events/s, all read by the client")


def emitted(flags: list[str], users: int, tokens: int, stagger: float) -> list[Event]:
    """What the emulator says of each token that it sent."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "truth.csv"
        server = subprocess.Popen(
            [sys.executable, "-m", "pytest_llmserve.emulator", "--port", "0",
             "--truth-log", str(log), *flags],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            port = listening(server)
            read_streams(port, users, tokens, stagger)
        finally:
            server.terminate()
            server.wait()
        return [event for event in read_truth(log) if event.token]


def cells(events: list[Event]) -> str:
    late = np.array([event.before - event.due for event in events])
    landed = np.array([event.after - event.due for event in events])
    shown = [f"{1e3 * value:.3f} ms" for value in np.percentile(late, [50, 90, 99, 99.9, 100])]
    return " | ".join([str(len(events)), *shown, f"{1e3 * np.percentile(landed, 99):.3f} ms"])


def listening(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    port = 0
    for line in server.stdout:
        if "Listening on" in line:
            port = int(line.rsplit(":", 1)[1])
        if "Ready" in line:
            return port
    raise SystemExit("the emulator did not start")


def read_streams(port: int, users: int, tokens: int, stagger: float) -> None:
    """One request a user, started at a random moment of the first half second; read to the end."""
    seeded = random.Random(0)
    body = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    poll = select.epoll()
    open_streams: dict[int, socket.socket] = {}
    tails: dict[int, bytes] = {}
    for _ in range(users):
        stream = socket.create_connection(("127.0.0.1", port))
        prompt = [seeded.randrange(150_000) for _ in range(128)]
        payload = json.dumps(body | {"prompt": prompt}).encode()
        stream.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(payload)
            + payload
        )
        poll.register(stream.fileno(), select.EPOLLIN)
        open_streams[stream.fileno()] = stream
        tails[stream.fileno()] = b""
        time.sleep(stagger * seeded.random())
    while open_streams:
        for descriptor, _mask in poll.poll():
            data = open_streams[descriptor].recv(1 << 16)
            tail = tails[descriptor] = (tails[descriptor] + data)[-64:]
            if not data or b"[DONE]" in tail:
                poll.unregister(descriptor)
                open_streams.pop(descriptor).close()


if __name__ == "__main__":
    main()
