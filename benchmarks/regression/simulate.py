"""How often do gates cry wolf, and what do they see? One command, a Markdown table:

    python benchmarks/regression/simulate.py

A test has a history of `--baseline` runs of an unchanged server; one new run comes, of a server
that is unchanged or slower by 3 to 30 %. Each rule says whether it has become slower. Ours may ask
for a second run, as it does in use; all others decide at once, as they do.

The model: a run's mean latency is exp(noise · z), z standardised and skewed to the slow side
(gamma with skewness 1; `--shape` for others). Its requests are lognormal (σ 0.4, skewness 1.3), and
each remembers the one before (AR(1), 0.8). Throughput is 1 / mean latency.

The second table gives every other rule the threshold at which it has, at that very noise, the
false alarms of ours: what it could see if it were tuned by someone who knew the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import signal, stats

from pytest_llmserve.verdict.regression import judge_new

Floats = npt.NDArray[np.float64]

NOISES = (0.01, 0.03, 0.08, 0.15)
EFFECTS = (0.03, 0.05, 0.10, 0.20, 0.30)
REQUESTS = 100
MEMORY = 0.8
SPREAD = 0.4
FLOOR = 0.03
CHUNK = 500


@dataclass(frozen=True)
class Trials:
    """Latencies of trials × runs × requests: the history, and two new runs of each trial."""

    old: Floats
    new: Floats


def draw(shape: str, rng: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Standardised run-to-run noise, slow side positive."""
    if shape == "normal":
        return rng.standard_normal(size)
    if shape == "skewed":
        return (rng.gamma(4.0, size=size) - 4.0) / 2.0
    return rng.standard_t(5, size) / np.sqrt(5 / 3)


def runs(shape: str, rng: np.random.Generator, noise: float, size: tuple[int, int]) -> Floats:
    """Latencies of `size` runs, each with the mean that its noise gives it."""
    steps = rng.standard_normal((*size, REQUESTS)) * np.sqrt(1 - MEMORY**2)
    steps[..., 0] = rng.standard_normal(size)
    latency = np.exp(SPREAD * signal.lfilter([1.0], [1.0, -MEMORY], steps, axis=-1))
    mean = np.exp(noise * draw(shape, rng, size))
    return latency / latency.mean(axis=-1, keepdims=True) * mean[..., None]


#: A rule gives each trial a score and a threshold: slower is said if the score is above it.
Rule = Callable[[Trials], Floats]


def fixed(t: Trials) -> Floats:
    """Throughput of the new run against that of the last one."""
    return 1 - t.old[:, -1].mean(-1) / t.new[:, 0].mean(-1)


def pytest_benchmark(t: Trials) -> Floats:
    """`--benchmark-compare-fail=min:5%`: smallest time against that of the last saved run."""
    return t.new[:, 0].min(-1) / t.old[:, -1].min(-1) - 1


def pytest_benchmark_mean(t: Trials) -> Floats:
    """`--benchmark-compare-fail=mean:5%`: mean time against that of the last saved run."""
    return t.new[:, 0].mean(-1) / t.old[:, -1].mean(-1) - 1


def asv(t: Trials) -> Floats:
    """`asv continuous`: ratio of medians, if Mann-Whitney on the samples gives p < 0.002."""
    old, new = t.old[:, -1], t.new[:, 0]
    p_values = stats.mannwhitneyu(new, old, axis=-1, method="asymptotic").pvalue
    ratio = np.median(new, -1) / np.median(old, -1)
    return np.where(p_values < 0.002, ratio, 1.0)


def criterion(t: Trials) -> Floats:
    """Lower end of the 95 % interval of the change of the mean, samples taken as independent
    (Welch, which its bootstrap approaches); its noise threshold is 1 %."""
    old, new = t.old[:, -1], t.new[:, 0]
    error = np.sqrt((new.var(-1, ddof=1) + old.var(-1, ddof=1)) / REQUESTS)
    return (new.mean(-1) - old.mean(-1) - 1.96 * error) / old.mean(-1)


def best_of(t: Trials) -> Floats:
    """Throughput of the new run against the best of the history."""
    return 1 - t.old.mean(-1).min(-1) / t.new[:, 0].mean(-1)


def pooled_requests(t: Trials) -> Floats:
    """Mann-Whitney on all requests: the new run's against the whole history's, as a z-value."""
    old = t.old.reshape(len(t.old), -1)
    p_values = stats.mannwhitneyu(
        t.new[:, 0], old, axis=-1, alternative="greater", method="asymptotic"
    ).pvalue
    return -stats.norm.ppf(np.clip(p_values, 1e-300, 1.0 - 1e-16))


OTHERS: dict[str, tuple[Rule, float]] = {
    "fixed 10 %, one run": (fixed, 0.10),
    "pytest-benchmark min:5%": (pytest_benchmark, 0.05),
    "pytest-benchmark mean:5%": (pytest_benchmark_mean, 0.05),
    "asv, factor 1.1": (asv, 1.1),
    "criterion, 1 %": (criterion, 0.01),
    "best of history + 5 %": (best_of, 0.05),
    "Mann-Whitney on requests": (pooled_requests, 1.645),
}


@dataclass(frozen=True)
class Ours:
    """What our rule said of each trial, and how many new runs it took on average."""

    slower: npt.NDArray[np.bool_]
    taken: float


def ours(t: Trials) -> Ours:
    """The package's own rule, with the second run where it asks for one."""
    old, new = 1 / t.old.mean(-1), 1 / t.new.mean(-1)
    said = np.zeros(len(old), dtype=bool)
    taken = 0
    for i in range(len(old)):
        finding = judge_new([float(new[i, 0])], old[i].tolist(), "higher", FLOOR).finding
        taken += 1
        if finding == "suspected":
            finding = judge_new(new[i].tolist(), old[i].tolist(), "higher", FLOOR).finding
            taken += 1
        said[i] = finding == "regression"
    return Ours(said, taken / len(old))


@dataclass(frozen=True)
class Scores:
    """All rules on the trials of one noise and one effect."""

    ours: Ours
    others: dict[str, Floats]


def score(
    shape: str, noise: float, effect: float, trials: int, baseline: int, seed: int, *, alone: bool
) -> Scores:
    """Run the trials in chunks, because requests are many. `alone`: only our rule."""
    rng = np.random.default_rng([seed, round(noise * 1000), round(effect * 1000)])
    said, taken = [], []
    others: dict[str, list[Floats]] = {name: [] for name in OTHERS}
    for start in range(0, trials, CHUNK):
        size = min(CHUNK, trials - start)
        old = runs(shape, rng, noise, (size, baseline))
        new = runs(shape, rng, noise, (size, 2)) / (1 - effect)
        chunk = Trials(old, new)
        found = ours(chunk)
        said.append(found.slower)
        taken.append(found.taken)
        if not alone:
            for name, (rule, _) in OTHERS.items():
                others[name].append(rule(chunk))
    joined = {name: np.concatenate(parts) for name, parts in others.items() if parts}
    return Scores(Ours(np.concatenate(said), float(np.mean(taken))), joined)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=8000, help="of the unchanged server")
    parser.add_argument("--baseline", type=int, default=10, help="runs in the history, 5 or more")
    parser.add_argument("--shape", choices=("skewed", "normal", "heavy"), default="skewed")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.baseline < 5 or options.trials < 100:
        parser.error("--baseline must be 5 or more and --trials 100 or more")

    def scores(
        noise: float, effect: float, *, shape: str = options.shape, alone: bool = False
    ) -> Scores:
        trials = options.trials if effect == 0 else max(100, options.trials // 4)
        return score(shape, noise, effect, trials, options.baseline, options.seed, alone=alone)

    found = {
        (noise, effect): scores(noise, effect) for noise in NOISES for effect in (0.0, *EFFECTS)
    }
    as_used, tuned, behind, worst = [], [], [], 0.0
    for noise in NOISES:
        null = found[noise, 0.0]
        alarms = float(null.ours.slower.mean())
        worst = max(worst, alarms)
        power = [float(found[noise, e].ours.slower.mean()) for e in EFFECTS]
        label = f"{noise:.0%}".replace("%", " %")
        as_used.append([label, "**ours**", *map(percent, [alarms, *power])])
        tuned.append([label, "**ours**", *map(percent, [alarms, *power])])
        for name, (_, threshold) in OTHERS.items():
            shares = [
                float((found[noise, e].others[name] > threshold).mean()) for e in (0.0, *EFFECTS)
            ]
            as_used.append([label, name, *map(percent, shares)])
            # At least one false alarm in the trials: a share of 0 would leave no threshold.
            level = np.quantile(
                null.others[name], 1 - max(alarms, 1 / options.trials), method="higher"
            )
            seen = [float((found[noise, e].others[name] > level).mean()) for e in EFFECTS]
            false = float((null.others[name] > level).mean())
            tuned.append([label, name, *map(percent, [false, *seen])])
            for effect, one, other in zip(EFFECTS, power, seen, strict=True):
                error = np.sqrt(
                    (one * (1 - one) + other * (1 - other)) / max(100, options.trials // 4)
                )
                if other > one + 3 * error:
                    behind.append(f"{name} at noise {label}, −{effect:.0%}")
    head = ["noise", "rule", "false alarms %", *(f"−{e:.0%} found %" for e in EFFECTS)]
    print(f"History of {options.baseline} runs, {options.shape} noise, {options.trials} trials.\n")
    print("### As they are used\n\n" + table(head, as_used))
    print("\n### Tuned to our false alarms\n\n" + table(head, tuned))
    shapes = [s for s in ("skewed", "normal", "heavy") if s != options.shape]
    print("\n### False alarms of ours with other noise, %\n")
    rows = []
    for shape in shapes:
        shares = [float(scores(n, 0.0, shape=shape, alone=True).ours.slower.mean()) for n in NOISES]
        worst = max(worst, *shares)
        rows.append([shape, *map(percent, shares)])
    print(table(["noise", *(f"{n:.0%}" for n in NOISES)], rows))
    print(f"\nNew runs that ours takes if nothing changed: {found[0.08, 0.0].ours.taken:.2f}.")
    # Three standard errors of a share of 1 %: what sampling alone may add.
    allowed = 0.01 + 3 * np.sqrt(0.01 * 0.99 / options.trials)
    print(f"Worst false alarms of ours: {percent(worst)} % (target 1 %).")
    print(f"Rules with more power at equal false alarms: {'; '.join(behind) or 'none'}.")
    return 0 if worst <= allowed and not behind else 1


if __name__ == "__main__":
    raise SystemExit(main())
