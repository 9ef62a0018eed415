"""What loading the plugin costs a pytest run that does not use it.

    python benchmarks/plugin_load.py [--runs 21]

Runs `pytest --collect-only` in an empty folder with the plugin and with `-p no:llmserve`, in turn,
and prints the medians, the median of the paired differences and its spread, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

COMMAND = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")


def once(folder: str, *extra: str) -> float:
    """Seconds that one whole pytest process takes."""
    start = time.perf_counter()
    subprocess.run([*COMMAND, *extra], cwd=folder, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(once(folder), once(folder, "-p", "no:llmserve")) for _ in range(runs + 2)][2:]
    added = sorted(with_it - without for with_it, without in pairs)
    rows = {
        f"with the plugin, median of {runs}": statistics.median(p[0] for p in pairs),
        "without (`-p no:llmserve`)": statistics.median(p[1] for p in pairs),
        "added, median of pairs": statistics.median(added),
    }
    print("| `pytest --collect-only`, empty folder | ms |\n|---|---|")
    for what, seconds in rows.items():
        print(f"| {what} | {seconds * 1e3:.1f} |")
    low, high = added[len(added) // 4], added[-len(added) // 4]
    print(f"| added, quartiles | {low * 1e3:.1f} to {high * 1e3:.1f} |")


if __name__ == "__main__":
    main()
