"""How accurate and how cheap is the load client? `python benchmarks/client/run.py`.

Prints one table of its errors against the emulator's log of true times, quiet and with busy
processes on the client's core, what the barest of loops would cost, and how many events a core
can record. The server has a core of its own, and real-time priority where that is allowed, so that
what is measured is the client. Needs Linux and two cores; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest_llmserve.load import calibration, client
from pytest_llmserve.load.calibration import errors, exact_server
from pytest_llmserve.load.clock import ANCILLARY, SO_TIMESTAMPNS
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.priority import scheduled_soon
from pytest_llmserve.metrics.definitions import measure

TTFT, TPOT, TOKENS = 0.2, 0.02, 100
SERVER_CORE, CLIENT_CORE = 0, 1


@contextmanager
def busy(count: int):
    """So many processes that never rest, on the client's core."""
    spin = f"import os; os.sched_setaffinity(0, {{{CLIENT_CORE}}})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def accuracy(users: int, duration: float, disturbers: int, ramp: float | None) -> dict:
    """Errors and cost of one closed loop against the exact schedule; seconds."""
    plan = LoadPlan(
        closed_loop(users, ramp=ramp), Workload(128, TOKENS), duration=duration, warmup=users
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "truth.csv")
        os.sched_setaffinity(0, {SERVER_CORE})
        times = ("--schedule", "exact", "--ttft", str(TTFT), "--tpot", str(TPOT))
        with exact_server(log, *times) as url:
            os.sched_setaffinity(0, {CLIENT_CORE})
            target = Target(url, calibration.MODEL, {}, {"ignore_eos": True}, calibration._IDS)
            with busy(disturbers):
                record = drive(target, plan)
        found = errors(record, log)
    metrics = measure(record, plan)
    planned = record.phase == 1
    return {
        "busy processes": disturbers,
        "requests": len(found.ttft),
        "events": int(record.events[planned].sum()),
        "ttft error": {q: float(np.percentile(found.ttft, q)) for q in (50, 95, 99)},
        "itl error p99": float(np.percentile(np.abs(found.itl), 99)),
        "send delay p99": metrics["send_delay"]["p99"],
        "client lag p99": metrics["client_lag"]["p99"],
        "cpu per 1000 events": (record.info.cpu + record.info.decode_cpu)
        / int(record.events[planned].sum())
        * 1e3,
        "delivered": metrics["concurrency"]["mean"] / users,
        "timestamps": record.info.timestamps,
    }


def floor(users: int, duration: float, ramp: float) -> float:
    """CPU seconds for 1,000 events of a loop that only waits, receives and takes the time.

    The same server and the same users, but nothing is parsed, kept in order or checked: what this
    machine and Python take of the client's cost.
    """
    body = json.dumps({
        "model": calibration.MODEL, "prompt": list(calibration._IDS[:128]), "max_tokens": TOKENS,
        "stream": True, "ignore_eos": True,
    }).encode()  # fmt: skip
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, {SERVER_CORE})
        times = ("--schedule", "exact", "--ttft", str(TTFT), "--tpot", str(TPOT))
        with exact_server(Path(folder, "truth.csv"), *times) as url, scheduled_soon():
            os.sched_setaffinity(0, {CLIENT_CORE})
            poll, conns = select.epoll(), {}
            for _ in range(users):
                conn = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                conn.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                poll.register(conn.fileno(), select.EPOLLIN)
                conns[conn.fileno()] = conn
            begin, waiting, kept = time.monotonic(), list(conns.values()), []
            spent = time.process_time()
            while (now := time.monotonic()) < begin + duration:
                while waiting and now >= begin + ramp * (users - len(waiting)) / users:
                    waiting.pop().send(request)
                for fd, _ in poll.poll(0.02 if waiting else 1.0):
                    data, ancillary, _, _ = conns[fd].recvmsg(1 << 14, ANCILLARY)
                    kept.append((data, ancillary[0][2], time.monotonic()))
                    if data.endswith(b"0\r\n\r\n"):
                        conns[fd].send(request)
            spent = time.process_time() - spent
            for conn in conns.values():
                conn.close()
    return spent / len(kept) * 1e3


EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":" token","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _blast(port: int, events: int) -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    with socket.create_server(("127.0.0.1", port), reuse_port=True) as listening:
        conn, _ = listening.accept()
        with conn:
            conn.recv(1 << 16)
            conn.sendall(HEAD)
            block = CHUNK * 1000
            for _ in range(events // 1000):
                conn.sendall(block)
            conn.sendall(END)
            conn.recv(1)


def rate(per_read: int, events: int) -> dict:
    """Events recorded a second of CPU time when so many come in each read, and their decoding."""
    client._READ_SIZE = len(CHUNK) * per_read
    client.BODY_CAP = client.RAW_CAP = 1 << 40
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=_blast, args=(port, events))
    server.start()
    while not _listening(port):
        time.sleep(0.05)
    os.sched_setaffinity(0, {CLIENT_CORE})
    ended = []
    driver = client.Client(
        f"http://127.0.0.1:{port}",
        timeout=120.0,
        stream=True,
        prepare=lambda exchange: setattr(exchange, "request", b"GET / HTTP/1.1\r\n\r\n"),
        on_end=ended.append,
    )
    exchange = client.Exchange(1, -1, 0)
    exchange.intended = time.monotonic()
    driver.schedule(exchange)
    start, wall = time.process_time(), time.monotonic()
    driver.run(lambda: not ended)
    recorded, wall = time.process_time() - start, time.monotonic() - wall
    start = time.process_time()
    driver.decode()
    decoded = time.process_time() - start
    driver.close()
    server.join()
    answer = exchange.answer
    assert answer is not None
    assert len(answer.reads) == events, len(answer.reads)
    return {
        "events a read": per_read,
        "events": events,
        "recorded a second of CPU": events / recorded,
        "recorded a second": events / wall,
        "decoded a second of CPU": events / decoded,
    }


def _listening(port: int) -> bool:
    entry = f"0100007F:{port:04X} 00000000:0000 0A"
    return entry in Path("/proc/net/tcp").read_text()


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None or math.isnan(seconds) else f"{seconds * 1e3:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--duration", type=float, default=20.0)
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 4])
    parser.add_argument("--ramp", type=float, help="0: all users start in lockstep")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = [accuracy(options.users, options.duration, n, options.ramp) for n in options.busy]
    ramp = TTFT + TPOT * TOKENS if options.ramp is None else options.ramp
    least = floor(options.users, options.duration, ramp)
    rates = [rate(1, 200_000), rate(8, 400_000)]
    print(
        "| busy | requests | TTFT error p50 / p95 / p99, ms | ITL error p99, ms | sent late p99 |"
    )
    print("|---|---|---|---|---|")
    for row in load:
        ttft = " / ".join(_ms(row["ttft error"][q]) for q in (50, 95, 99))
        print(
            f"| {row['busy processes']} | {row['requests']} | {ttft} "
            f"| {_ms(row['itl error p99'])} | {_ms(row['send delay p99'])} ms |"
        )
    print("\n| busy | CPU s per 1,000 events | delivered load | read late p99 | timestamps |")
    print("|---|---|---|---|---|")
    for row in load:
        print(
            f"| {row['busy processes']} | {row['cpu per 1000 events']:.4f} "
            f"| {row['delivered']:.2%} | {_ms(row['client lag p99'])} ms | {row['timestamps']} |"
        )
    print(f"\nA loop that only waits and receives: {least:.4f} CPU s per 1,000 events.")
    print("\n| events a read | recorded a second of CPU | recorded a second | decoded |")
    print("|---|---|---|---|")
    for row in rates:
        print(
            f"| {row['events a read']} | {row['recorded a second of CPU']:,.0f} "
            f"| {row['recorded a second']:,.0f} | {row['decoded a second of CPU']:,.0f} |"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"accuracy": load, "floor": least, "rates": rates}, indent=1)
        )


if __name__ == "__main__":
    main()
