"""A plan for people and programs: text, Markdown, JSON and a plot. All say that it is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_llmserve.emulator.simulate import Simulated
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.arithmetic import amount
from pytest_llmserve.plan import Lift, Plan, UserRange
from pytest_llmserve.report.units import show

COMPUTED = "COMPUTED, not measured"

_SHOWN = ("output_throughput", "total_throughput", "user_throughput.p50", "ttft.p50", "ttft.p95")
_TABLE = ("output_throughput", "user_throughput.p50", "ttft.p95")
_HEADS = {
    "output_throughput": "output",
    "total_throughput": "prompts and output",
    "user_throughput.p50": "a user's",
    "ttft.p50": "TTFT p50",
    "ttft.p95": "TTFT p95",
}


def as_text(plan: Plan) -> str:
    """For a terminal."""
    width = max(len(line.what) for line in plan.lines)
    how = max(len(line.how) for line in plan.lines)
    parts = [
        f"{COMPUTED}: {_title(plan)}",
        "",
        *(
            f"  {line.what:<{width}}  {line.how:<{how}}  = {amount(line.value, line.unit)}"
            for line in plan.lines
        ),
        "",
        *_sentences(plan),
        "",
        *_columns(*_curve(plan)),
    ]
    if plan.lifts:
        parts += ["", f"What would lift it, and by how much, for {plan.users} users:", ""]
        parts += _columns(*_lifts(plan))
    return "\n".join([*parts, "", _note(plan), ""])


def as_markdown(plan: Plan) -> str:
    """For documents."""
    rows = [[line.what, line.how, amount(line.value, line.unit)] for line in plan.lines]
    parts = [f"**{COMPUTED}**: {_title(plan)}", ""]
    parts += _pipes(["", "arithmetic", "is"], rows)
    for sentence in _sentences(plan):
        parts += ["", sentence]
    parts += ["", *_pipes(*_curve(plan))]
    if plan.lifts:
        parts += ["", f"What would lift it, and by how much, for {plan.users} users:", ""]
        parts += _pipes(*_lifts(plan))
    return "\n".join([*parts, "", _note(plan), ""])


def as_json(plan: Plan) -> str:
    """For programs: seconds, rates per second, bytes."""
    return json.dumps(as_dict(plan), indent=1, ensure_ascii=False) + "\n"


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; what is not a number is null."""
    case = plan.case
    return {
        "schema": "llmserve-plan/1",
        "computed": True,
        "measured": False,
        "model": case.shape.name,
        "hardware": case.hardware.name,
        "devices": case.hardware.devices,
        "hardware_source": case.hardware.source,
        "weights": case.precision.weights,
        "kv": case.precision.kv,
        "users": plan.users,
        "prompt_tokens": case.prompt,
        "output_tokens": case.output,
        "draft_tokens": case.draft_tokens,
        "objectives": [str(objective) for objective in plan.objectives],
        "arithmetic": [
            {"name": x.name, "what": x.what, "how": x.how, "value": x.value, "unit": x.unit}
            for x in plan.lines
        ],
        "expected": _metrics(plan.seen),
        "binds": {"what": plan.binding.what, "why": plan.binding.why},
        "users_within": _range(plan.range),
        "curve": [
            {"users": p.users, "ceiling": p.ceiling, "expected": _metrics(p.seen)}
            for p in plan.curve
        ],
        "lifts": [
            {
                "change": x.change,
                "factor": x.factor,
                "expected": _metrics(x.seen),
                "users_that_fit": x.users_that_fit,
                "users_within": None if x.range is None else _range(x.range),
            }
            for x in plan.lifts
        ],
    }


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json}


def plot(plan: Plan, path: Path) -> None:
    """Draw throughput and time to first token over users into an .svg or .png file.

    Raises ConfigError if the file cannot be written so, or the extra `report` is missing.
    """
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise ConfigError(f"--plot {path}: name a file that ends in .svg or .png")
    try:
        vl_convert: Any = import_module("vl_convert")
    except ImportError:
        raise ConfigError(
            "--plot needs the optional extra `report`: pip install 'pytest-llmserve[report]'"
        ) from None
    spec = _chart(plan)
    try:
        if kind == ".svg":
            path.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        else:
            path.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
    except OSError as error:
        raise ConfigError(f"--plot {path}: it cannot be written ({error.strerror})") from None


def _title(plan: Plan) -> str:
    case = plan.case
    drafts = f", {case.draft_tokens} tokens speculated" if case.draft_tokens else ""
    return (
        f"{case.shape.name} with {case.precision.weights} weights and {case.precision.kv} KV cache "
        f"on {case.hardware.title}{drafts}; {plan.users} users, {case.prompt} tokens in and "
        f"{case.output} out"
    )


def _sentences(plan: Plan) -> Iterable[str]:
    seen = "; ".join(f"{_HEADS[name]} {show(name, plan.seen.value(name))}" for name in _SHOWN)
    yield f"Expected in a closed loop of {plan.users} users (simulated): {seen}."
    yield f"{plan.binding.what.capitalize()} binds: {plan.binding.why}."
    asked = " and ".join(str(objective) for objective in plan.objectives)
    within = f"Users within {asked}" if asked else "Users that it takes"
    yield f"{within}: {_shown_range(plan.range)} ({plan.range.why})."


def _note(plan: Plan) -> str:
    hardware = plan.case.hardware
    return (
        f"Nothing here was measured. Assumed: {hardware.bandwidth_efficiency:.0%} of the bandwidth "
        f"and {hardware.compute_efficiency:.0%} of the peak are reached; source: {hardware.source}."
    ).replace("%", " %")


def _shown_range(found: UserRange) -> str:
    if found.most is None or found.least is None:
        return "none"
    return f"up to {found.most:,}" if found.least == 1 else f"{found.least:,} to {found.most:,}"


def _curve(plan: Plan) -> tuple[list[str], list[list[str]]]:
    heads = ["users", "ceiling", *(_HEADS[name] for name in _TABLE)]
    return heads, [
        [
            str(point.users),
            show("output_throughput", point.ceiling),
            *(show(name, point.seen.value(name)) for name in _TABLE),
        ]
        for point in plan.curve
    ]


def _lifts(plan: Plan) -> tuple[list[str], list[list[str]]]:
    heads = ["change", "factor", *(_HEADS[name] for name in _TABLE), "users that fit"]
    ranged = any(lift.range for lift in plan.lifts)
    rows = [_lift(lift, ranged) for lift in plan.lifts]
    return [*heads, "users within"] if ranged else heads, rows


def _lift(lift: Lift, ranged: bool) -> list[str]:
    row = [
        lift.change,
        f"× {lift.factor:.2f}",
        *(show(name, lift.seen.value(name)) for name in _TABLE),
        f"{lift.users_that_fit:,}",
    ]
    return [*row, _shown_range(lift.range)] if ranged and lift.range else row


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [heads, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return [
        "  " + row[0].ljust(widths[0]) + "".join(
            "  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        for row in table
    ]  # fmt: skip


def _pipes(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _metrics(seen: Simulated) -> dict[str, float | None]:
    found = {name: seen.value(name) for name in (*_SHOWN, "tpot.p50", "request_throughput")}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _range(found: UserRange) -> dict[str, Any]:
    return {"least": found.least, "most": found.most, "why": found.why}


def _chart(plan: Plan) -> dict[str, Any]:
    """Two panels over users, as Vega-Lite: tokens/s with its ceiling, and time to first token."""
    rates = [
        {"users": p.users, "rate": value, "what": what}
        for p in plan.curve
        for what, value in (
            ("ceiling", p.ceiling),
            ("expected", p.seen.output_throughput),
        )
    ]
    times = [{"users": p.users, "ttft": p.seen.ttft_p95} for p in plan.curve]
    x = {"field": "users", "type": "quantitative", "title": "users"}
    here = {"data": {"values": [{"users": plan.users}]},
            "mark": {"type": "rule", "strokeDash": [2, 3], "color": "#8b949e"},
            "encoding": {"x": x}}  # fmt: skip
    what = {
        "field": "what", "type": "nominal", "title": None,
        "scale": {"domain": ["ceiling", "expected"], "range": ["#8b949e", "#0072b2"]},
    }  # fmt: skip
    throughput = {
        "width": 420, "height": 220,
        "layer": [
            {"data": {"values": rates}, "mark": {"type": "line", "point": True},
             "encoding": {"x": x, "color": what, "strokeDash": {**what, "scale": {
                 "domain": ["ceiling", "expected"], "range": [[5, 4], [1, 0]]}},
                 "y": {"field": "rate", "type": "quantitative", "title": "output tokens/s"}}},
            here,
            *_bound(plan, ("output_throughput",)),
        ],
    }  # fmt: skip
    latency = {
        "width": 420, "height": 160,
        "layer": [
            {"data": {"values": times}, "mark": {"type": "line", "color": "#d55e00",
             "point": {"color": "#d55e00"}}, "encoding": {"x": x, "y": {
                 "field": "ttft", "type": "quantitative", "title": "TTFT p95, s"}}},
            here,
            *_bound(plan, ("ttft.p95",)),
        ],
    }  # fmt: skip
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": {"text": COMPUTED, "subtitle": _title(plan).split("; "), "anchor": "start"},
        "background": "white",
        "vconcat": [throughput, latency],
    }


def _bound(plan: Plan, metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"data": {"values": [{"bound": o.bound}]},
         "mark": {"type": "rule", "color": "#b0578d", "strokeDash": [6, 3]},
         "encoding": {"y": {"field": "bound", "type": "quantitative"}}}
        for o in plan.objectives if o.metric in metrics
    ]  # fmt: skip
