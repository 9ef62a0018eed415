"""Load clients side by side against exact times: `python benchmarks/client/peers.py`.

Each client in turn drives 30 users against the emulator's exact schedule (first token 200 ms after
the request's arrival, 50 tokens/s a user), on one core, first alone there and then with busy
processes beside it; the server has the other core. What each reports is compared with the server's
log of true times. Prints one Markdown table with the machine's load average.

The peers are installed at the versions below, each into an environment of its own under `.peers/`
(but for `vllm bench serve`, which needs the Python of an environment with vLLM: --vllm-python).
Needs Linux, two cores and an otherwise quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from run import CLIENT_CORE, SERVER_CORE, TOKENS, TPOT, TTFT, busy

from pytest_llmserve.emulator.truth import read_truth
from pytest_llmserve.load import calibration
from pytest_llmserve.load.calibration import compare, errors, exact_server
from pytest_llmserve.load.control import drive
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop

HERE = Path(__file__).parent
PEERS = HERE / ".peers"
TINY = HERE.parents[1] / "tests/tiny_model.py"
PROMPT, MODEL = 128, calibration.MODEL
REQUEST = TTFT + (TOKENS - 1) * TPOT
_SAMPLE = 0.25
#: Our own client's rows: seconds over which its users start. The peers know no such spread; it is
#: less than half a request, so that every user sends as many.
SPREAD = {"pytest-llmserve, in lockstep": 0.0, "pytest-llmserve, as it does": 0.4 * REQUEST}

# vLLM's own command line asks for the metadata of a package that its CPU build calls otherwise.
_VLLM = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)


@dataclass(frozen=True)
class Seen:
    """What a client reports, in seconds: of each request the arrival of its first token on
    `time.monotonic()`, its TTFT, and the gaps between its events (none: it keeps none)."""

    first: list[float]
    ttft: list[float]
    gaps: list[list[float]]


def wall_offset() -> float:
    return time.time() - time.monotonic()


class Vllm:
    name = "vllm bench serve"
    package = None

    def command(self, options, url, folder, users, requests):
        return [
            options.vllm_python, "-c", _VLLM, "--backend", "openai", "--base-url", url,
            "--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", options.tokenizer,
            "--dataset-name", "random", "--random-input-len", PROMPT,
            "--random-output-len", TOKENS, "--num-prompts", users * requests,
            "--max-concurrency", users, "--ignore-eos", "--save-result", "--save-detailed",
            "--result-dir", folder, "--result-filename", "vllm.json", "--disable-tqdm",
        ]  # fmt: skip

    def read(self, folder):
        found = json.loads(Path(folder, "vllm.json").read_text())
        starts, ttfts = found["start_times"], found["ttfts"]
        return Seen([s + t for s, t in zip(starts, ttfts, strict=True)], ttfts, found["itls"])


class InferencePerf:
    name, package, minor = "inference-perf", "inference-perf==0.7.0", 12

    def command(self, options, url, folder, users, requests):
        length = {"min": PROMPT, "max": PROMPT, "mean": PROMPT, "std_dev": 0}
        output = {"min": TOKENS, "max": TOKENS, "mean": TOKENS, "std_dev": 0}
        count = {"total_count": users * requests}
        config = {
            "api": {"type": "completion", "streaming": True},
            "server": {"type": "vllm", "model_name": MODEL, "base_url": url, "ignore_eos": True},
            "tokenizer": {"pretrained_model_name_or_path": str(options.tokenizer)},
            "data": {
                "type": "random",
                "input_distribution": length | count,
                "output_distribution": output | count,
            },
            "load": {
                "type": "concurrent",
                "stages": [{"concurrency_level": users, "num_requests": users * requests}],
                "num_workers": 1,
                "worker_max_concurrency": users,
            },
            "report": {"request_lifecycle": {"summary": True, "per_request": True}},
            "storage": {"local_storage": {"path": str(folder)}},
        }
        path = Path(folder, "config.json")  # JSON is YAML
        path.write_text(json.dumps(config))
        return [PEERS / "inference-perf/bin/inference-perf", "-c", path]

    def read(self, folder):
        first, ttft, gaps = [], [], []
        for one in json.loads(Path(folder, "per_request_lifecycle_metrics.json").read_text()):
            times = one["info"]["response_metrics"]["chunk_times"]
            first.append(times[0])
            ttft.append(times[0] - one["start_time"])
            gaps.append(list(np.diff(times)))
        return Seen(first, ttft, gaps)


class Guidellm:
    name, package, minor = "guidellm", "guidellm==0.8.1", 11

    def command(self, options, url, folder, users, requests):
        return [
            PEERS / "guidellm/bin/guidellm", "run",
            "--backend",
            f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={users}",
            "--constraint", f"kind=max_requests,count={users * requests}",
            "--tokenizer", f"kind=huggingface_auto,model={options.tokenizer}",
            "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}",
            "--output", f"kind=json,path={folder}/guidellm.json", "--disable-console",
        ]  # fmt: skip

    def read(self, folder):
        (benchmark,) = json.loads(Path(folder, "guidellm.json").read_text())["benchmarks"]
        asked = benchmark["requests"]["successful"]
        offset = wall_offset()
        return Seen(
            [one["info"]["timings"]["first_token_iteration"] - offset for one in asked],
            [one["time_to_first_token_ms"] / 1e3 for one in asked],
            [[] for _ in asked],
        )


class Aiperf:
    name, package, minor = "aiperf", "aiperf==0.13.0", 11

    def command(self, options, url, folder, users, requests):
        return [
            PEERS / "aiperf/bin/aiperf", "profile", "--model", MODEL, "--url", url,
            "--endpoint-type", "completions", "--streaming", "--tokenizer", options.tokenizer,
            "--concurrency", users, "--request-count", users * requests,
            "--synthetic-input-tokens-mean", PROMPT, "--synthetic-input-tokens-stddev", 0,
            "--output-tokens-mean", TOKENS, "--output-tokens-stddev", 0,
            "--extra-inputs", "ignore_eos:true", "--output-artifact-dir", folder,
            "--export-level", "records", "--ui", "none",
        ]  # fmt: skip

    def read(self, folder):
        first, ttft, gaps = [], [], []
        offset = wall_offset()
        for line in Path(folder, "profile_export.jsonl").read_text().splitlines():
            one = json.loads(line)
            ttft.append(one["metrics"]["time_to_first_token"]["value"] / 1e3)
            first.append(one["metadata"]["request_start_ns"] / 1e9 + ttft[-1] - offset)
            gaps.append([g / 1e3 for g in one["metrics"]["inter_chunk_latency"]["value"]])
        return Seen(first, ttft, gaps)


ALL = (Vllm(), InferencePerf(), Guidellm(), Aiperf())


def install(peer) -> None:
    """Make the peer's environment unless it is there."""
    folder = PEERS / peer.package.partition("==")[0]
    if not (folder / "ready").exists():
        python = interpreter(peer.minor)
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "-q", peer.package], check=True)
        (folder / "ready").touch()


def interpreter(minor: int) -> str:
    """A Python 3.`minor`: this one, one on the path, or one of pyenv's."""
    if sys.version_info[:2] == (3, minor):
        return sys.executable
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"3.{minor}.*/bin/python"))
    for python in (f"python3.{minor}", *map(str, pyenv)):
        try:
            if subprocess.run([python, "-V"], capture_output=True).returncode == 0:
                return python
        except OSError:
            continue
    raise SystemExit(f"a peer needs Python 3.{minor}, and there is none here")


class Cost:
    """CPU time of a process and all below it, sampled while it runs."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._of: dict[tuple[int, float], float] = {}
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(_SAMPLE):
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in tree:
                try:
                    times = process.cpu_times()
                    key = process.pid, process.create_time()
                except psutil.Error:
                    continue
                self._of[key] = times.user + times.system
            self.samples.append((time.monotonic(), sum(self._of.values())))

    def between(self, begin: float, end: float) -> float:
        self._over.set()
        self._thread.join()
        times, spent = zip(*self.samples, strict=True)
        return float(np.diff(np.interp([begin, end], times, spent))[0])


def measure(peer, options, disturbers: int) -> dict:
    """One client's row: errors in seconds, CPU seconds per 1,000 events, delivered share."""
    with tempfile.TemporaryDirectory(prefix="llmserve-peers-") as folder:
        log = Path(folder, "truth.csv")
        os.sched_setaffinity(0, {SERVER_CORE})
        times = ("--schedule", "exact", "--ttft", str(TTFT), "--tpot", str(TPOT))
        with exact_server(log, *times) as url:
            if peer in SPREAD:
                found, cost = ours(url, options, disturbers, log, SPREAD[peer])
            else:
                found, cost = theirs(peer, url, options, disturbers, Path(folder), log)
        truth = list(read_truth(log))
    # A client may send a request to see whether the server is there: those of the load count.
    left = np.array([event.before for event in truth if event.token])
    count = options.users * options.requests
    begin = sorted(event.due for event in truth if event.token == 0)[-count]
    span = left.max() - begin
    events = int((left >= begin).sum())
    # Users who start one after another are not all there at the start, nor at the end.
    span -= SPREAD.get(peer, 0.0) * (options.users - 1) / options.users
    return {
        "ttft": {q: float(np.percentile(found.ttft, q)) for q in (50, 95, 99)},
        "itl": float(np.percentile(np.abs(found.itl), 99)) if len(found.itl) else None,
        "requests": len(found.ttft),
        "cpu": cost(begin, left.max()) / events * 1e3,
        "delivered": events / TOKENS * REQUEST / (options.users * span),
    }


def ours(url, options, disturbers, log, ramp):
    # The last request of each user begins before the plan's end and is drained.
    plan = LoadPlan(
        closed_loop(options.users, ramp=ramp),
        Workload(PROMPT, TOKENS),
        duration=(options.requests - 0.5) * REQUEST,
    )
    target = Target(url, MODEL, {}, {"ignore_eos": True}, calibration._IDS)
    os.sched_setaffinity(0, {CLIENT_CORE})
    with busy(disturbers):
        record = drive(target, plan)
    found = errors(record, log)
    return found, lambda *_: record.info.cpu + record.info.decode_cpu


def theirs(peer, url, options, disturbers, folder, log):
    command = peer.command(options, url, folder, options.users, options.requests)
    offline = {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment = dict(os.environ) | ({} if isinstance(peer, Aiperf) else offline)
    with busy(disturbers), Path(folder, "said").open("w+b") as said:
        process = subprocess.Popen(
            ["taskset", "-c", str(CLIENT_CORE), *map(str, command)],
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
        )
        cost = Cost(process.pid)
        try:
            status = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()
            status = process.wait()
        if status:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace")[-600:])
    seen = peer.read(folder)
    gaps = [np.array(one) for one in seen.gaps]
    return compare(np.array(seen.first), np.array(seen.ttft), gaps, log), cost.between


def row(name: str, quiet: dict, disturbed: dict) -> str:
    def ttft(one: dict) -> str:
        return " / ".join(f"{one['ttft'][q] * 1e3:+.2f}" for q in (50, 95, 99))

    def itl(one: dict) -> str:
        return "keeps none" if one["itl"] is None else f"{one['itl'] * 1e3:.3f}"

    gaps = f"{itl(quiet)} / {itl(disturbed)}" if quiet["itl"] is not None else "keeps none"
    cells = (
        name, ttft(quiet), ttft(disturbed), gaps, f"{quiet['cpu']:.3f}",
        f"{quiet['delivered']:.1%} / {disturbed['delivered']:.1%}", str(quiet["requests"]),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--requests", type=int, default=6, help="of each user")
    parser.add_argument("--busy", type=int, default=1, help="busy processes on the client's core")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one client")
    parser.add_argument("--vllm-python", default=os.environ.get("LLMSERVE_VLLM_PYTHON"))
    parser.add_argument("--only", nargs="*", help="names of peers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = [peer for peer in ALL if options.only is None or peer.name in options.only]
    options.tokenizer = PEERS / "tokenizer"
    skipped = []
    for peer in list(peers):
        if peer.package is not None:
            install(peer)
        elif not options.vllm_python:
            peers.remove(peer)
            skipped.append(f"{peer.name}: not run, for --vllm-python was not given")
    if not (options.tokenizer / "tokenizer.json").exists():
        python = options.vllm_python or PEERS / "guidellm/bin/python"
        subprocess.run([python, TINY, options.tokenizer], check=True)
    loads = [os.getloadavg()[0]]
    rows, kept = [], {}
    for peer in (*peers, *SPREAD):
        name = peer if peer in SPREAD else peer.name
        version = "" if peer in SPREAD or not peer.package else " " + peer.package.split("==")[1]
        print(f"{name}{version} …", file=sys.stderr, flush=True)
        try:
            quiet, disturbed = (measure(peer, options, n) for n in (0, options.busy))
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            skipped.append(f"{name}: {error}")
            continue
        loads.append(os.getloadavg()[0])
        kept[name] = {"quiet": quiet, "busy": disturbed}
        rows.append(row(name + version, quiet, disturbed))
    with_busy = f"{options.busy} busy process{'es' * (options.busy > 1)}"
    print(
        f"{options.users} users who start at once, {options.requests} requests each, client on one "
        f"core, server on another; {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; "
        f"load average {loads[0]:.2f} before, {max(loads):.2f} at most\n"
    )
    print(
        f"| client | TTFT error p50 / p95 / p99, ms | the same, {with_busy} "
        "| ITL error p99, ms, quiet / busy | CPU s per 1,000 events | delivered | requests |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    for line in skipped:
        print(f"\n{line}")
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
