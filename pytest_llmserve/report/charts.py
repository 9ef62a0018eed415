"""The charts, as Vega-Lite made by Altair: one specification a kind, shared by all figures of it.

A `Figure` names its kind and brings data and title; the page joins them when it draws, and `svg`
joins them here. So a report of many runs holds each specification once. Values stay in seconds
and rates; axes show them with SI prefixes (200 m + s), no figure is converted here.
Colours are names that `themes` resolves.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from pytest_llmserve.report.themes import config, painted

Columns = Mapping[str, list[Any]]
Spec = dict[str, Any]

#: Shown in every picture of an emulated run.
EMULATED = "emulated: not measured on real hardware"

#: Colours and markers of runs side by side, in their order.
_VARIANT_COLOURS = ("@blue", "@orange", "@green", "@pink", "@amber", "@sky")
_VARIANT_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_AXIS_WIDTH = 64  # of all y axes, so that charts of one time axis line up


@dataclass(frozen=True)
class Figure:
    """One chart: its kind, title, data sets, and a sentence that says what it shows.

    `params` are values of the specification's parameters, `x` is the title of the x axis where the
    specification leaves it open.
    """

    kind: str
    title: str
    says: str
    data: Mapping[str, Columns]
    emulated: bool
    params: Mapping[str, Any] = field(default_factory=dict)
    x: str = ""


def specifications() -> dict[str, Spec]:
    """Every kind's specification, without data, title and colours."""
    return {kind: make() for kind, make in KINDS.items()}


def whole(figure: Figure, spec: Spec, theme: str, width: int) -> Spec:
    """A specification with the figure's data, title and colours in it: what a renderer needs."""
    full: Spec = painted(json.loads(json.dumps(spec)), theme)
    lines = textwrap.wrap(figure.title, max(20, (width - 70) // 7))
    full["title"] = {"text": lines, **({"subtitle": EMULATED} if figure.emulated else {})}
    full["datasets"] = {name: _rows(columns) for name, columns in figure.data.items()}
    for parameter in full.get("params", ()):
        parameter["value"] = figure.params.get(parameter["name"], parameter["value"])
    # A layer without data would only disturb scales.
    full["layer"] = [
        layer
        for layer in full["layer"]
        if full["datasets"].get(layer.get("data", full.get("data"))["name"])
    ]
    for layer in full["layer"]:
        x = layer["encoding"].get("x", {})
        if x.get("title") == "(x)":
            x["title"] = figure.x
    return {**full, "width": width, "config": config(theme)}


def svg(figure: Figure, theme: str = "light", width: int = 420) -> str:
    """The figure as SVG text, drawn without a browser."""
    import vl_convert

    spec = whole(figure, KINDS[figure.kind](), theme, width)
    return str(vl_convert.vegalite_to_svg(spec))


def _rows(columns: Columns) -> list[dict[str, Any]]:
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _data(name: str) -> alt.NamedData:
    return alt.NamedData(name=name)


def _seconds(**more: Any) -> alt.Axis:
    """An axis of durations: 20 µs, 300 ms, 1.5 s."""
    return alt.Axis(labelExpr="format(datum.value, '~s') + 's'", **more)


def _si(**more: Any) -> alt.Axis:
    """An axis of counts and rates: 800, 1.2k."""
    return alt.Axis(labelExpr="format(datum.value, '~s')", **more)


def _spec(chart: alt.LayerChart | alt.FacetChart) -> Spec:
    spec: Spec = chart.to_dict()
    spec.pop("config", None)
    spec["width"] = "container"
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _slo_layers() -> list[alt.Chart]:
    """The region that an objective allows, its bound and what it says."""
    region = (
        alt.Chart(_data("slo"))
        .mark_rect(color="@region", opacity=0.10)
        .encode(y=alt.Y("low:Q"), y2="high:Q")
    )
    bound = (
        alt.Chart(_data("slo")).mark_rule(color="@region", strokeDash=[2, 3]).encode(y="bound:Q")
    )
    label = (
        alt.Chart(_data("slo"))
        .mark_text(align="left", baseline="bottom", dx=4, dy=-2, color="@green", fontSize=10)
        .encode(x=alt.value(0), y="bound:Q", text="label:N")
    )
    return [region, bound, label]


def _curve(axis: Callable[..., alt.Axis], legend: bool) -> Spec:
    """Percentiles (or one value) against the amount of load, with the SLO region."""
    dash = alt.StrokeDash(
        "s:N", sort=None, legend=None, scale=alt.Scale(domain=["p50", "p95", "p99", "one"],
        range=[[1, 0], [6, 3], [2, 2], [1, 0]]),
    )  # fmt: skip
    x = alt.X("x:Q", title="(x)", scale=alt.Scale(zero=True, nice=False, padding=6))
    y = alt.Y("v:Q", title=None, axis=axis(tickCount=5, minExtent=_AXIS_WIDTH - 14))
    points = alt.Chart(_data("points"))
    line = points.mark_line(color="@blue", strokeWidth=1.8).encode(x=x, y=y, strokeDash=dash)
    dots = points.mark_point(size=34, color="@blue", opacity=1, strokeWidth=1.5).encode(
        x=x,
        y=y,
        fill=alt.Fill(
            "ok:N", legend=None, scale=alt.Scale(domain=[True, False], range=["@blue", "@paper"])
        ),
        tooltip=[
            alt.Tooltip("load:N", title="load"),
            alt.Tooltip("what:N", title="metric"),
            alt.Tooltip("text:N", title="value"),
        ],
    )
    layers = [*_slo_layers(), line, dots]
    if legend:
        layers.append(
            alt.Chart(_data("ends"))
            .mark_text(align="left", dx=7, fontSize=11, color="@blue")
            .encode(x=x, y=y, text="s:N")
        )
    return _spec(alt.layer(*layers).properties(height=190))


def _compare(axis: Callable[..., alt.Axis]) -> Spec:
    """One line a variant against the amount of load."""
    x = alt.X("x:Q", title="(x)", scale=alt.Scale(zero=True, nice=False, padding=6))
    y = alt.Y("v:Q", title=None, axis=axis(tickCount=5, minExtent=_AXIS_WIDTH - 14))
    order = alt.Scale(range=list(_VARIANT_COLOURS))
    points = alt.Chart(_data("points"))
    line = points.mark_line(strokeWidth=1.8).encode(
        x=x, y=y, color=alt.Color("variant:N", sort=None, scale=order, legend=None)
    )
    dots = points.mark_point(size=44, opacity=1, filled=True).encode(
        x=x,
        y=y,
        color=alt.Color("variant:N", sort=None, scale=order),
        shape=alt.Shape("variant:N", sort=None, scale=alt.Scale(range=list(_VARIANT_SHAPES))),
        tooltip=[
            alt.Tooltip("variant:N", title="run"),
            alt.Tooltip("load:N", title="load"),
            alt.Tooltip("text:N", title="value"),
        ],
    )
    # Scales of their own, so that the legend is that of the points: colour and marker in one.
    layers = alt.layer(*_slo_layers(), line, dots).resolve_scale(
        color="independent", shape="independent"
    )
    return _spec(layers.properties(height=200))


def _time_params() -> list[alt.Parameter]:
    return [alt.param("t0", value=0), alt.param("t1", value=1)]


def _time(title: str | None) -> alt.X:
    """The time axis that all charts of one run share; `t0` and `t1` zoom it."""
    scale = alt.Scale(
        domainMin=alt.ExprRef("t0"), domainMax=alt.ExprRef("t1"), nice=False, zero=False
    )
    return alt.X(
        "t:Q", title=title, scale=scale, axis=alt.Axis(tickCount=8, labelExpr="datum.label + ' s'")
    )


def _window() -> alt.Chart:
    """The measured window, in grey."""
    chart: alt.Chart = (
        alt.Chart(_data("window"))
        .mark_rect(color="@band", opacity=0.10, clip=True)
        .encode(x=_time(None), x2="until:Q")
    )
    return chart


def _rate() -> Spec:
    bins = alt.Chart(_data("bins"))
    y = alt.Y(
        "rate:Q",
        title="tokens/s",
        axis=_si(tickCount=4, minExtent=_AXIS_WIDTH, maxExtent=_AXIS_WIDTH),
    )
    bars = bins.mark_rect(color="@blue", opacity=0.8, clip=True).encode(
        x=_time(None), x2="until:Q", y=y, y2=alt.datum(0),
        tooltip=[
            alt.Tooltip("t:Q", title="from (s)"),
            alt.Tooltip("rate:Q", title="tokens/s"),
        ],
    )  # fmt: skip
    mean = alt.Chart(_data("mean")).mark_rule(color="@orange", strokeWidth=1.4).encode(y="v:Q")
    layers = alt.layer(_window(), bars, mean)
    return _spec(layers.properties(height=120).add_params(*_time_params()))


def _flight() -> Spec:
    colours = alt.Scale(range=["@ink", "@blue", "@orange"])
    dashes = alt.Scale(range=[[1, 0], [6, 2], [2, 2]])
    line = (
        alt.Chart(_data("flight"))
        .mark_line(interpolate="step-after", strokeWidth=1.5, clip=True)
        .encode(
            x=_time(None),
            y=alt.Y(
                "v:Q",
                title="requests",
                scale=alt.Scale(padding=3),
                axis=_si(tickCount=4, minExtent=_AXIS_WIDTH, maxExtent=_AXIS_WIDTH),
            ),
            color=alt.Color("what:N", sort=None, scale=colours),
            strokeDash=alt.StrokeDash("what:N", sort=None, scale=dashes),
        )
    )
    return _spec(alt.layer(_window(), line).properties(height=120).add_params(*_time_params()))


def _gauge(title: str, axis: alt.Axis, domain: tuple[float, float] | None = None) -> Spec:
    """Readings over time; `slowed` are stretches in which a chip was slowed down."""
    scale = alt.Scale(domain=list(domain)) if domain else alt.Scale(zero=False, padding=4)
    slowed = (
        alt.Chart(_data("slowed"))
        .mark_rect(color="@pink", opacity=0.35, clip=True)
        .encode(x=_time(None), x2="until:Q")
    )
    data = alt.Chart(_data("readings"))
    y = alt.Y("v:Q", title=title, scale=scale, axis=axis)
    if domain:
        line = {"color": "@green", "strokeWidth": 1.5}
        mark = data.mark_area(color="@green", opacity=0.25, clip=True, line=line)
    else:
        mark = data.mark_line(color="@green", strokeWidth=1.5, clip=True)
    layers = alt.layer(_window(), slowed, mark.encode(x=_time(None), y=y))
    return _spec(layers.properties(height=80).add_params(*_time_params()))


def _share() -> Spec:
    axis = alt.Axis(format="%", tickCount=3, minExtent=_AXIS_WIDTH, maxExtent=_AXIS_WIDTH)
    return _gauge("share", axis, (0.0, 1.0))


def _unit(title: str, unit: str) -> Spec:
    """Readings in a unit, with SI prefixes: 1.98 GHz."""
    text = f"format(datum.value, '~s') + '{unit}'"
    axis = alt.Axis(labelExpr=text, tickCount=3, minExtent=_AXIS_WIDTH, maxExtent=_AXIS_WIDTH)
    return _gauge(title, axis)


def _waterfall(lanes: bool) -> Spec:
    """A bar a request, from when it was wanted to its first token and on to its end. `lanes`: one
    row a user, else one row a request; zooming in time keeps the requests that are there, and
    their rows fill the height."""
    base = (
        alt.Chart(_data("requests"))
        .transform_filter("datum.end >= t0 && datum.start <= t1")
        .transform_window(place="row_number()", sort=[alt.SortField("row")])
        .transform_calculate(
            rank="datum.lane + 0.92" if lanes else "datum.place",
            below="datum.lane + 0.08" if lanes else "datum.place - 1",
            seen="isValid(datum.first) ? datum.first : datum.end",
            ttft="isValid(datum.first) ? format(datum.first - datum.start, '.3~s') + 's' : 'none'",
            e2e="format(datum.end - datum.start, '.3~s') + 's'",
            at="format(datum.start, '.2f') + ' s'",
        )
    )
    y = alt.Y(
        "below:Q", title="users" if lanes else "requests, in order of arrival",
        scale=alt.Scale(reverse=True, nice=False, zero=False),
        axis=alt.Axis(
            labels=False, ticks=False, grid=False, minExtent=_AXIS_WIDTH, maxExtent=_AXIS_WIDTH
        ),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("row:Q", title="request"),
        alt.Tooltip("user:Q", title="user"),
        alt.Tooltip("at:N", title="wanted at"),
        alt.Tooltip("ttft:N", title="first token after"),
        alt.Tooltip("e2e:N", title="ended after"),
        alt.Tooltip("tokens:Q", title="output tokens"),
        alt.Tooltip("error:N", title="error"),
    ]
    names = ["to first token", "first token to end", "failed"]
    colour = alt.Color(
        "part:N", scale=alt.Scale(domain=names, range=["@amber", "@blue", "@orange"])
    )

    def bar(part: str, left: str, right: str, keep: str) -> alt.Chart:
        chart: alt.Chart = (
            base.transform_filter(keep)
            .transform_calculate(part=f"'{part}'", t=f"datum.{left}", until=f"datum.{right}")
            .mark_rect(clip=True)
            .encode(x=_time("time since the load's start"), x2="until:Q", y=y, y2="rank:Q",
                    color=colour, tooltip=tooltip)
        )  # fmt: skip
        return chart

    waiting = bar("to first token", "start", "seen", "datum.error == ''")
    decoding = bar(
        "first token to end", "first", "end", "datum.error == '' && isValid(datum.first)"
    )
    failed = bar("failed", "start", "end", "datum.error != ''")
    marks = (
        base.transform_filter("datum.error != ''")
        .transform_calculate(t="datum.end")
        .mark_point(
            shape="cross", angle=45, color="@orange", size=30, filled=True, opacity=1, clip=True
        )
        .encode(x=_time("time since the load's start"), y=y, tooltip=tooltip)
    )
    layers = alt.layer(waiting, decoding, failed, marks)
    return _spec(layers.properties(height=360).add_params(*_time_params()))


def _distribution() -> Spec:
    axis = _seconds(tickCount=6, labelOverlap="greedy", labelSeparation=8)
    x = alt.X("v:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=axis)
    y = alt.Y("share:Q", title="share at or below", axis=alt.Axis(format="%", tickCount=5))
    band = (
        alt.Chart(_data("band"))
        .mark_area(orient="horizontal", color="@band", opacity=0.35)
        .encode(x=alt.X("low:Q", scale=alt.Scale(type="log", nice=False)), x2="high:Q", y=y)
    )
    line = (
        alt.Chart(_data("line"))
        .mark_line(color="@blue", strokeWidth=1.8, interpolate="linear")
        .encode(x=x, y=y, order="share:Q")
    )
    marked = alt.Chart(_data("marks"))
    dots = marked.mark_point(size=36, color="@blue", filled=True, opacity=1).encode(
        x=x, y=y, tooltip=[alt.Tooltip("text:N", title="value")]
    )
    above = marked.transform_filter("datum.share != 0.95").mark_text(
        align="right", dx=-8, dy=-5, color="@ink", fontSize=11
    )
    below = marked.transform_filter("datum.share == 0.95").mark_text(
        align="left", dx=7, dy=9, color="@ink", fontSize=11
    )
    labels = [side.encode(x=x, y=y, text="text:N") for side in (above, below)]
    spec = _spec(alt.layer(band, line, dots, *labels).properties(height=190))
    return {**spec, "padding": {"left": 2, "right": 48, "top": 4, "bottom": 2}}


def _trend(axis: Callable[..., alt.Axis]) -> Spec:
    x = alt.X(
        "i:Q", title="(x)", scale=alt.Scale(zero=False, nice=False, padding=10),
        axis=alt.Axis(tickMinStep=1, format="d"),
    )  # fmt: skip
    y = alt.Y(
        "v:Q",
        title=None,
        scale=alt.Scale(zero=False, padding=12),
        axis=axis(tickCount=5, minExtent=_AXIS_WIDTH - 14),
    )
    band = (
        alt.Chart(_data("band"))
        .mark_rect(color="@band", opacity=0.22)
        .encode(x=alt.X("i1:Q"), x2="i2:Q", y=alt.Y("low:Q"), y2="high:Q")
    )
    middle = (
        alt.Chart(_data("band")).mark_rule(color="@band").encode(x="i1:Q", x2="i2:Q", y="middle:Q")
    )
    accepted = (
        alt.Chart(_data("accepted"))
        .mark_rule(color="@pink", strokeDash=[4, 3])
        .encode(x="i:Q", tooltip=[alt.Tooltip("reason:N", title="accepted change")])
    )
    looks = {
        "origin": ("@green", "square"), "stored": ("@blue", "circle"),
        "this run": ("@orange", "diamond"), "passed": ("@blue", "circle"),
        "inconclusive": ("@amber", "triangle-up"), "failed": ("@orange", "cross"),
        "invalid": ("@pink", "cross"), "not judged": ("@muted", "circle"),
        "A": ("@blue", "circle"), "B": ("@orange", "square"),
    }  # fmt: skip
    names = list(looks)
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(
            domain=names,
            range=[colour for colour, _ in looks.values()],
        ),
        legend=None,
    )
    shape = alt.Shape(
        "kind:N",
        scale=alt.Scale(
            domain=names,
            range=[shape for _, shape in looks.values()],
        ),
        legend=None,
    )
    points = alt.Chart(_data("points"))
    line = points.mark_line(color="@blue", strokeWidth=1, opacity=0.6).encode(
        x=x, y=y, detail="side:N"
    )
    dots = points.mark_point(size=48, filled=True, opacity=1).encode(
        x=x,
        y=y,
        color=colour,
        shape=shape,
        tooltip=[
            alt.Tooltip("when:N", title="when"),
            alt.Tooltip("kind:N", title="run"),
            alt.Tooltip("text:N", title="value"),
        ],
    )
    return _spec(alt.layer(band, middle, accepted, line, dots).properties(height=150))


#: Kind of figure → its specification. Data sets and their columns are named in it.
KINDS: Mapping[str, Callable[[], Spec]] = {
    "latency_curve": lambda: _curve(_seconds, legend=True),
    "throughput_curve": lambda: _curve(_si, legend=False),
    "latency_compare": lambda: _compare(_seconds),
    "throughput_compare": lambda: _compare(_si),
    "rate": _rate,
    "flight": _flight,
    "share": _share,
    "power": lambda: _unit("power", "W"),
    "memory": lambda: _unit("memory", "B"),
    "clock": lambda: _unit("clock", "Hz"),
    "temperature": lambda: _unit("temperature", " °C"),
    "waterfall": lambda: _waterfall(lanes=False),
    "lanes": lambda: _waterfall(lanes=True),
    "distribution": _distribution,
    "latency_trend": lambda: _trend(_seconds),
    "throughput_trend": lambda: _trend(_si),
}
