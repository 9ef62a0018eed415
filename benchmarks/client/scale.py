"""How much load one client process drives: `python benchmarks/client/scale.py`.

An open loop of requests for one token at rising rates, against a server that does nothing but
answer (so that it is not the limit), and a closed loop of many streams at once against the
emulator. The client has one core, the server the other. A rate counts as delivered if the run is
valid; the table says what made it invalid otherwise. Needs Linux and two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import select
import socket
import tempfile
import time
from pathlib import Path

from run import CLIENT_CORE, SERVER_CORE

from pytest_llmserve.load import calibration
from pytest_llmserve.load.calibration import exact_server
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop, open_loop
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.verdict.validity import check


def _event(value) -> bytes:
    data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


PROMPT = 8
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + _event({"choices": [{"index": 0, "text": " a"}]})
    + _event({"choices": [], "usage": {"prompt_tokens": PROMPT, "completion_tokens": 1}})
    + _event("[DONE]")
    + b"0\r\n\r\n"
)


def _answer_all(port) -> None:
    """One token for whatever comes; a request is taken to be one segment."""
    os.sched_setaffinity(0, {SERVER_CORE})
    poll = select.epoll()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        port.send(listening.getsockname()[1])
        listening.setblocking(False)
        poll.register(listening, select.EPOLLIN)
        open_: dict[int, socket.socket] = {}
        while True:
            for fd, _ in poll.poll():
                if fd == listening.fileno():
                    conn = listening.accept()[0]
                    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    open_[conn.fileno()] = conn
                    poll.register(conn, select.EPOLLIN)
                elif open_[fd].recv(1 << 16):
                    open_[fd].send(ANSWER)
                else:
                    open_.pop(fd).close()


def _verdict(record, plan) -> str:
    metrics = measure(record, plan)
    found = check(record, metrics, plan, counters={}, bounds={})
    bad = [f"{one.check}: {one.detail}" for one in found if not one.ok]
    return "; ".join(bad) or "valid"


def rate(per_second: int, duration: float, shards: int) -> tuple[str, ...]:
    """One row: delivered, sent late, CPU share, verdict."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=_answer_all, args=(there,))
    server.start()
    try:
        url = f"http://127.0.0.1:{here.recv()}"
        plan = LoadPlan(
            open_loop(per_second, lead_in=1.0), Workload(PROMPT, 1), duration=duration, warmup=64
        )
        os.sched_setaffinity(0, {CLIENT_CORE})
        record = drive(Target(url, "m", {}, {}, calibration._IDS), plan, shards=shards)
    finally:
        server.kill()
        server.join()
    metrics = measure(record, plan)
    span = record.end.max() - record.info.start
    return (
        f"{per_second:,}",
        str(shards),
        f"{metrics['request_throughput']:,.0f}",
        f"{metrics['send_delay']['p50'] * 1e3:.2f} / {metrics['send_delay']['p99'] * 1e3:.2f}",
        f"{(record.info.cpu - record.info.spun) / span:.0%}",
        _verdict(record, plan),
    )


def streams(users: int) -> tuple[str, ...]:
    """One row: the most at once, events/s, errors, read late, CPU share, verdict."""
    plan = LoadPlan(closed_loop(users, ramp=6.0), Workload(PROMPT, 6), duration=8.0, drain=60.0)
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, {SERVER_CORE})
        times = ("--schedule", "exact", "--ttft", "0.5", "--tpot", "1.0")
        with exact_server(Path(folder, "truth.csv"), *times) as url:
            os.sched_setaffinity(0, {CLIENT_CORE})
            body = {"ignore_eos": True}
            record = drive(Target(url, calibration.MODEL, {}, body, calibration._IDS), plan)
    metrics = measure(record, plan)
    span = record.end.max() - record.info.start
    return (
        f"{users:,}",
        str(metrics["concurrency"]["max"]),
        f"{metrics['output_throughput']:,.0f}",
        f"{sum(metrics['errors'].values())}",
        f"{metrics['client_lag']['p99'] * 1e3:.2f}",
        f"{(record.info.cpu - record.info.spun) / span:.0%}",
        _verdict(record, plan),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=int, nargs="*", default=[2000, 5000, 10000, 12000])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--duration", type=float, default=5.0)
    options = parser.parse_args()
    print(f"load average before {os.getloadavg()[0]:.2f}, {time.strftime('%Y-%m-%d %H:%M')}\n")
    head = ("requests/s", "processes", "ended/s", "sent late p50 / p99, ms", "CPU", "run")
    _table(head, [rate(one, options.duration, options.shards) for one in options.rates])
    head = ("streams", "most at once", "events/s", "errors", "read late p99, ms", "CPU", "run")
    _table(head, [streams(options.streams)])


def _table(head, rows) -> None:
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


if __name__ == "__main__":
    main()
