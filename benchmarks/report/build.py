"""How long the HTML report takes to build, and how large it is.

    python benchmarks/report/build.py [--requests 30000] [--tokens 128] [--runs 50]

Makes one result of so many requests by arithmetic (not a measurement), then builds the report of
one such run and of many in processes of their own, from `import` to the written file, on two cores
where the system can be told so. Medians of `--repeat` builds; CPU time says what it costs where
other work keeps the machine busy. The time to beat for one run is 5 s, the size for 50 is 6 MB.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from report_samples import document, make_run, write

COMMAND = (
    "import argparse, sys\n"
    "from pytest_llmserve.commands.report import add_parser\n"
    "parser = argparse.ArgumentParser()\n"
    "add_parser(parser.add_subparsers())\n"
    "args = parser.parse_args()\n"
    "sys.exit(args.run(args))\n"
)


def build(result: Path, output: Path) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, that a whole process takes to make the report."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", COMMAND, "report", str(result), "-o", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    users = 100
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        each = 0.43 + args.tokens * 0.052  # what a request takes in the sample
        run = make_run(
            base, "large", users, args.requests / users * each, output_tokens=args.tokens
        )
        count = run["metrics"]["requests"]
        one = write(base / "one.json", document(run))
        many = write(
            base / "many.json", document(*({**run, "test": f"t::{i}"} for i in range(args.runs)))
        )
        size = f"{count:,} requests, {count * args.tokens:,} events"
        print(f"| report of runs of {size} each | s | CPU s | MB |")
        print("|---|---|---|---|")
        for name, result in (("1 run", one), (f"{args.runs} runs", many)):
            output = base / "report.html"
            times = [build(result, output) for _ in range(args.repeat)]
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {name} | {wall:.2f} | {cpu:.2f} | {output.stat().st_size / 1e6:.2f} |")


if __name__ == "__main__":
    main()
