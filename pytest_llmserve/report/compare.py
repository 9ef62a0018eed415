"""Which runs belong side by side, decided by what was measured and on what.

Cases of one test fall into classes: within a class the fingerprints agree in every field that must
match, so its cases are repeats (nights, say) and make a history; between classes something
differs, and the latest case of each stands beside those of the others, the difference named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llmserve.report.digest import Case, Json, amount, label_of, show_load
from pytest_llmserve.report.text import clean, clean_value
from pytest_llmserve.verdict.fingerprint import comparable, differences

#: From so many repeats on they are drawn as a history; fewer stand side by side.
HISTORY = 5
#: What is compared in tables, in this order.
METRICS = (
    "output_throughput", "total_throughput", "request_throughput", "user_throughput.p50",
    "ttft.p50", "ttft.p95", "ttft.p99", "tpot.p50", "tpot.p95", "tpot.p99", "itl.p99",
    "e2e.p50", "e2e.p95", "e2e.p99",
)  # fmt: skip
#: Fields that name a variant to a reader, the most telling first.
_NAMING = (
    "engine", "engine_version", "model", "quantization", "hardware", "server", "load", "driver",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A fingerprint field that differs: its value in each variant, and whether it must match."""

    field: str
    values: tuple[str, ...]
    must: bool


@dataclass(frozen=True)
class SideBySide:
    """Variants of one test with a name each, and the fields in which they differ."""

    cases: tuple[Case, ...]
    names: tuple[str, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Comparison:
    """What there is to compare of one test: variants (or None) and histories."""

    variants: SideBySide | None
    histories: tuple[tuple[Case, ...], ...]


def stem(test: str) -> str:
    """A test's id without its parameters: cases of one stem are compared."""
    return test.split("[", 1)[0]


def facts(case: Case) -> dict[str, Any]:
    """The fingerprint fields in which all runs of a case agree."""
    prints = [run["fingerprint"] for run in case.runs]
    return {k: v for k, v in prints[0].items() if all(p.get(k) == v for p in prints)}


def compare(cases: Sequence[Case], times: Mapping[int, float]) -> Comparison:
    """Sort the cases of one stem into variants and histories.

    `times` maps `id(case)` to its Unix time where that is known; cases stay in order elsewhere.
    """
    ordered = sorted(cases, key=lambda c: (times.get(id(c), 0.0), c.number))
    classes: list[list[Case]] = []
    for case in ordered:
        for found in classes:
            if comparable(facts(found[0]), facts(case)) and found[0].test == case.test:
                found.append(case)
                break
        else:
            classes.append([case])
    variants = None
    if len(classes) > 1:
        variants = side_by_side([found[-1] for found in classes])
    elif 1 < len(classes[0]) < HISTORY:
        variants = side_by_side(classes[0])
    histories = tuple(tuple(found) for found in classes if len(found) >= HISTORY)
    return Comparison(variants, histories)


def side_by_side(cases: Sequence[Case]) -> SideBySide:
    """Name the cases by what differs, and list all fields that do."""
    prints = [facts(case) for case in cases]
    must = {
        d.field for other in prints[1:] for d in differences(prints[0], other) if d.kind == "must"
    }
    fields = sorted({name for p in prints for name in p})
    differing = [name for name in fields if any(p.get(name) != prints[0].get(name) for p in prints)]
    found = [
        Difference(name, tuple(clean_value(name, p.get(name)) for p in prints), name in must)
        for name in sorted(differing, key=lambda name: (name not in must, name))
    ]
    return SideBySide(tuple(cases), names_of(cases, prints), tuple(found))


def names_of(cases: Sequence[Case], prints: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A short name for each case, different from the others'."""
    parts: list[list[str]] = [[] for _ in cases]

    def distinct() -> bool:
        return len({" ".join(p) for p in parts}) == len(cases)

    for name in _NAMING:
        values = [p.get(name) for p in prints]
        if all(value == values[0] for value in values):
            continue
        for part, value, case in zip(parts, values, cases, strict=True):
            shown = show_load(case.runs[0]) if name == "load" else clean_value(name, value)
            part.append(shown[:48])
        if distinct():
            break
    if not distinct():
        for part, case in zip(parts, cases, strict=True):
            bracket = clean(case.test, 200).partition("[")[2].rstrip("]")
            part += [bracket] if bracket else []
    if not distinct():
        for part, case in zip(parts, cases, strict=True):
            part.append(f"file {case.number + 1}")
    return tuple(" ".join(part) or f"run {i}" for i, part in enumerate(parts, 1))


def common_runs(cases: Sequence[Case]) -> list[Json]:
    """Of each case the run of the largest load that all have, else each one's last run."""
    loads = [
        {(run["load"]["kind"], amount(run), label_of(run)): run for run in case.runs}
        for case in cases
    ]
    shared = set.intersection(*(set(found) for found in loads))
    if not shared:
        return [case.runs[-1] for case in cases]
    largest = max(shared, key=lambda key: key[1:])
    return [found[largest] for found in loads]
