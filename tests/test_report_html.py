"""The HTML report: what it shows equals the result file, is escaped, says emulated, stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pytest_llmserve.report.text import HIDDEN, clean, clean_value

pytest.importorskip("altair", reason="needs the extra `report`")
pytest.importorskip("vl_convert", reason="needs the extra `report`")

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.report import charts, html, series

BAD = "</script><script>document.title='owned'</script><!--"
SECRETS = ("sk-abcdefghijklmnopqrstuv", "hunter2hunter2", "s3cretPa55")


class Page(HTMLParser):
    """The parts of a page that tests ask for: tags, visible text, rows of tables, chart data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.rows: list[tuple[str, list[float]]] = []
        self._inside: list[str] = []
        self._head = ""
        self.feed(text)
        self.text = " ".join("".join(self.words).split())
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in ("script", "style"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self._head = ""
            self.rows.append(("", []))
        if tag == "th":
            self._inside.append(tag)
        if tag == "data":
            self.rows[-1][1].append(float(found["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
        if tag == "th":
            self.rows[-1] = (" ".join(self._head.split()), self.rows[-1][1])

    def handle_data(self, data: str) -> None:
        where = self._inside[-1] if self._inside else ""
        if where == "script":
            self.scripts[-1] += data
        elif where != "style":
            self.words.append(data)
            if where == "th":
                self._head += data

    def row(self, head: str) -> list[list[float]]:
        """The figures of every row with this heading."""
        return [values for name, values in self.rows if name == head]

    def figures(self, kind: str) -> list[dict[str, Any]]:
        return [figure for figure in self.data["figures"] if figure["kind"] == kind]


def page_of(*documents: Mapping[str, Any], base: Path | Sequence[Path], **options: Any) -> Page:
    bases = [base] * len(documents) if isinstance(base, Path) else base
    return Page(html.render(documents, bases, **options))


@pytest.fixture(scope="module")
def capstone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    folder = tmp_path_factory.mktemp("capstone")
    content = samples.capstone(folder)
    return folder, content, page_of(content, base=folder)


def test_samples_are_result_files(
    capstone: Any, schema: Callable[[str], Mapping[str, Any]]
) -> None:
    Draft202012Validator(schema("result")).validate(json.loads(json.dumps(capstone[1])))


def test_every_distribution_shown_is_the_results(capstone: Any) -> None:
    _, content, page = capstone
    for name in ("ttft", "tpot", "itl", "e2e", "user_throughput", "send_delay", "client_lag"):
        wanted = [
            [run["metrics"][name][s] for s in ("mean", "p50", "p90", "p95", "p99", "max")]
            for run in content["runs"]
        ]
        assert page.row(name) == wanted
    throughputs = [[run["metrics"]["output_throughput"]] for run in content["runs"]]
    assert [r for r in page.row("output_throughput") if len(r) == 1 and r in throughputs]


def test_objectives_show_measured_and_margin(capstone: Any) -> None:
    _, content, page = capstone
    verdict = content["runs"][0]["verdicts"][1]
    assert page.row("ttft.p95") == [[verdict["measured"]]]
    margin = (verdict["bound"] - verdict["measured"]) / verdict["bound"]
    assert f"{margin:+.1%}".replace("%", " %") in page.text


def test_curve_points_and_table_are_the_results(capstone: Any) -> None:
    _, content, page = capstone
    curve = [run for run in content["runs"] if run["test"] == samples.CURVE]
    for name, figure in zip(("ttft", "tpot", "e2e"), page.figures("latency_curve"), strict=True):
        points = figure["data"]["points"]
        drawn = {(s, x): v for s, x, v in zip(points["s"], points["x"], points["v"], strict=True)}
        assert drawn == {
            (s, run["load"]["users"]): run["metrics"][name][s]
            for s in ("p50", "p95", "p99")
            for run in curve
        }
    (throughput,) = page.figures("throughput_curve")
    assert throughput["data"]["points"]["v"] == [
        run["metrics"]["output_throughput"] for run in curve
    ]
    region = throughput["data"]["slo"]
    assert (region["low"], region["bound"]) == ([800.0], [800.0])
    thirty = [r for r in page.row("30 users") if len(r) == 11]
    metrics = curve[-1]["metrics"]
    assert thirty == [
        [metrics["output_throughput"], metrics["user_throughput"]["p50"]]
        + [metrics[name][s] for name in ("ttft", "tpot", "e2e") for s in ("p50", "p95", "p99")]
    ]


def test_the_clients_own_error_is_shown(tmp_path: Path) -> None:
    error = {
        "ttft_error": {"p50": 1e-5, "p99": 4.2e-4}, "itl_error": {"p50": 1e-6, "p99": 1.5e-5},
        "pacing_error": {"p50": 2e-5, "p99": 9e-5}, "cpu_per_event": 7e-6,
        "events_limit": 140_000.0,
    }  # fmt: skip
    document = {**samples.document(samples.make_run(tmp_path, "a", 4, 3.0)), "calibration": error}
    page = page_of(document, base=tmp_path)
    for name in ("ttft_error", "itl_error", "pacing_error"):
        for statistic, value in error[name].items():
            assert page.row(f"{name}.{statistic}") == [[value]]
    assert page.row("cpu_per_event") == [[7e-6]]
    assert page.row("events_limit") == [[140_000.0]]
    assert "420 µs" in page.text
    assert "events_limit" not in page_of({**document, "calibration": None}, base=tmp_path).text


def test_many_users_have_a_row_for_each_request(tmp_path: Path) -> None:
    few, many = (samples.make_run(tmp_path, f"u{n}", n, 2.0) for n in (4, 121))
    assert page_of(samples.document(few), base=tmp_path).figures("lanes")
    page = page_of(samples.document(many), base=tmp_path)
    (figure,) = page.figures("waterfall")
    assert "a row for each request" in figure["title"]
    assert not page.figures("lanes")


def test_sides_of_a_comparison_are_told_apart(tmp_path: Path) -> None:
    runs = [
        samples.make_run(tmp_path, f"{i}", users, 3.0, seed=i, speed=1.0 + (label == "B"))
        | {"label": label}
        for users in (4, 8)
        for i, label in enumerate("ABBA")
    ]
    page = page_of(samples.document(*runs), base=tmp_path)
    for run in runs:
        name = f"{run['label']}: {run['load']['users']} users"
        found = [row for row in page.row(name) if len(row) == 11]
        assert run["metrics"]["output_throughput"] in [row[0] for row in found]
    compared = page.figures("latency_compare")[0]["data"]["points"]
    assert set(compared["variant"]) == {"A", "B"}
    assert not page.figures("latency_curve")
    order = page.figures("throughput_trend")[0]["data"]["points"]
    assert order["kind"] == list("ABBAABBA")
    assert order["v"] == [run["metrics"]["output_throughput"] for run in runs]
    summaries = [f"{label}: {users} users" for users in (4, 8) for label in "ABBA"]
    assert all(page.text.count(s) >= 2 for s in summaries)
    same = page_of(samples.document(*runs[:4]), base=tmp_path)
    assert [row for row in same.row("B: 4 users") if len(row) == 11]
    assert not same.figures("latency_compare")


def test_what_server_and_gpus_said_is_shown_where_it_is_known(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 8, 4.0, emulated=False, engine="vllm")
    samples.add_telemetry(run)
    page = page_of(samples.document(run), base=tmp_path)
    metrics = run["metrics"]
    assert page.row("server.running.max") == [[metrics["server"]["running"]["max"]]]
    assert page.row("server.prefix_hit_rate") == [[metrics["server"]["prefix_hit_rate"]]]
    assert page.row("server.preemptions") == [[metrics["server"]["preemptions"]]]
    assert page.row("server.acceptance_rate") == []  # null in the result
    assert page.row("gpu.power.mean") == [[metrics["gpu"]["power"]["mean"]]]
    assert page.row("energy_per_token") == [[metrics["energy_per_token"]]]
    assert page.row("roofline") == [[metrics["roofline"]]]
    assert "weights read in a step 16.4 GB" in page.text
    series = run["telemetry"]["series"]
    kinds = {"power": "power", "clock": "sm_clock", "memory": "memory_used"}
    for kind, name in (kinds | {"temperature": "temperature"}).items():
        (figure,) = page.figures(kind)
        assert figure["data"]["readings"] == {"t": series["time"], "v": series[f"gpu.{name}"]}
        assert figure["params"] == page.figures("rate")[0]["params"]  # one time axis
    (clock,) = page.figures("clock")
    assert clock["data"]["slowed"] == {"t": [1.0], "until": [2.0]}
    assert "350 W" in page.text
    assert "1,980 MHz" in page.text
    bare = page_of(
        samples.document(samples.make_run(tmp_path, "b", 8, 4.0, emulated=False)), base=tmp_path
    )
    assert not bare.figures("power")
    assert not [word for word in ("GPU", "Roofline", "server.running") if word in bare.text]


def test_over_time_adds_up(capstone: Any) -> None:
    folder, content, page = capstone
    record = series.read_record(folder, content["runs"][0]["events"])
    assert record is not None
    figure = page.figures("rate")[0]
    bins = figure["data"]["bins"]
    total = sum(
        rate * (until - t)
        for t, until, rate in zip(bins["t"], bins["until"], bins["rate"], strict=True)
    )
    assert total == pytest.approx(record.event_tokens.sum(), rel=1e-4)
    flight = page.figures("flight")[0]["data"]["flight"]
    assert set(flight["what"]) == {"in flight (client)", "running (server)", "waiting (server)"}
    client = [v for v, w in zip(flight["v"], flight["what"], strict=True) if "client" in w]
    assert max(client) == content["runs"][0]["metrics"]["concurrency"]["max"]


def test_distribution_passes_through_the_percentiles(capstone: Any) -> None:
    _, content, page = capstone
    metrics = content["runs"][0]["metrics"]
    for name, figure in zip(("ttft", "itl"), page.figures("distribution")[:2], strict=True):
        line = figure["data"]["line"]
        for s, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            assert np.interp(share, line["share"], line["v"]) == pytest.approx(
                metrics[name][s], rel=0.02
            )


def test_every_picture_and_the_page_say_emulated(capstone: Any) -> None:
    _, _, page = capstone
    assert all(figure["emulated"] for figure in page.data["figures"])
    assert "Emulated. Every number on this page comes from the emulated engine" in page.text
    labels = [a["aria-label"] for t, a in page.tags if "data-figure" in a and t == "div"]
    assert labels
    assert all(label and label.startswith("Emulated.") for label in labels)
    figure = charts.Figure(
        "share", "KV", "", {"readings": {"t": [0, 1], "v": [0.1, 0.2]}}, emulated=True
    )
    assert "emulated" in charts.svg(figure)
    real = charts.Figure(
        "share", "KV", "", {"readings": {"t": [0, 1], "v": [0.1, 0.2]}}, emulated=False
    )
    assert "emulated" not in charts.svg(real)


def test_real_runs_do_not_say_emulated(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 4, 3.0, emulated=False, engine="vllm")
    page = page_of(samples.document(run), base=tmp_path)
    assert page.text.count("mulated") == 1  # the fingerprint's field, which is "no"
    assert not any(figure.get("emulated") for figure in page.data["figures"])


def test_foreign_text_is_shown_and_never_run(tmp_path: Path) -> None:
    run = samples.make_run(
        tmp_path, "a", 4, 3.0, test=f"t.py::test[{BAD}]", server=BAD, engine=BAD,
        model="m\x1b[31m\u202e\udcffx", checks=((BAD, False, BAD),),
        bounds=(("ttft.p50", "<=", 1.0),),
        extra={BAD: BAD, "args.x": "'\"><img src=x onerror=alert(1)>"},
    )  # fmt: skip
    run["verdicts"][0] |= {"objective": BAD, "reason": BAD, "verdict": "invalid"}
    run["server_metrics"][BAD] = 1.0
    text = html.render([samples.document(run)], [tmp_path])
    assert text.encode()  # no lone surrogate is left
    page = Page(text)
    assert sum(1 for tag, _ in page.tags if tag == "script") == 3  # data, library, page
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert BAD in page.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "m\ufffd[31m" in page.text
    assert "</script><script>" not in page.scripts[0]


def test_secrets_do_not_show(tmp_path: Path) -> None:
    key, password, secret = SECRETS
    said = f"Authorization: Bearer {key} API_KEY={secret} --api-key {secret}"
    run = samples.make_run(
        tmp_path, "a", 4, 3.0, server=f"https://me:{password}@example.org/x",
        checks=(("start", False, said),),
        extra={"args.api-key": secret, "env.HF_TOKEN": secret, "args.note": f"token: {secret}"},
    )  # fmt: skip
    document = {**samples.document(run), "command": f"OPENAI_API_KEY={secret} pytest --token={key}"}
    text = html.render([document], [tmp_path])
    assert not [word for word in SECRETS if word in text]
    assert HIDDEN in text


def test_the_page_may_not_connect(capstone: Any) -> None:
    _, _, page = capstone
    metas = [
        attributes["content"] or ""
        for tag, attributes in page.tags
        if tag == "meta" and "content" in attributes
    ]
    policy = next(content for content in metas if "default-src" in content)
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert "unsafe-eval" not in policy
    outside = [
        (tag, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data") and not (value or "").startswith("#")
    ]
    assert outside == []


def test_structure_for_screen_readers(capstone: Any) -> None:
    _, _, page = capstone
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    assert ("html", {"lang": "en"}) in page.tags
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    drawn = [a for t, a in page.tags if "data-figure" in a]
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)


def test_a_large_run_is_sampled_and_says_so() -> None:
    record, _ = samples.make_record(50, 60.0, output_tokens=4, failures=40)
    total = len(record.phase)
    assert total > 5000
    rows, note = series.waterfall(record, 300)
    assert len(rows["row"]) == 300
    assert f"300 of {total:,} requests are drawn" in note
    assert sum(1 for error in rows["error"] if error) >= 40
    slowest = int(np.argmax(record.first - record.intended))
    assert slowest in rows["row"]
    assert rows["row"] == sorted(set(rows["row"]))
    bins, width = series.over_time(record, 60)
    assert len(bins["t"]) <= 60
    assert sum(bins["rate"]) * width == pytest.approx(record.event_tokens.sum(), rel=1e-4)


def test_rows_of_users_are_whole_or_not_drawn() -> None:
    record, _ = samples.make_record(50, 60.0, output_tokens=4)
    rows, note = series.lanes(record, 300)
    shown = set(rows["user"])
    whole = int(np.isin(record.user[record.phase == 1], list(shown)).sum())
    assert len(rows["row"]) == whole <= 400
    assert f"all those of {len(shown)} of 50 users" in note
    slowest = int(np.nanargmax(record.first - record.intended))
    assert int(record.user[slowest]) in shown
    assert sorted(set(rows["lane"])) == list(range(len(shown)))
    everything, note = series.lanes(record, 10**6)
    assert note.startswith("All")
    assert len(everything["row"]) == int((record.phase == 1).sum())


def test_warm_up_and_gaps_of_nothing_disturb_no_chart() -> None:
    from dataclasses import replace

    record, _ = samples.make_record(4, 3.0)
    early = record.event_time.copy()
    early[:10] = record.info.start - 1.0
    bins, width = series.over_time(replace(record, event_time=early), 60)
    assert sum(bins["rate"]) * width == pytest.approx(record.event_tokens.sum() - 10, rel=1e-4)
    line = series.distribution(np.array([0.0] * 30 + [0.002] * 70))
    assert min(line["v"]) == 0.002
    assert line["share"][0] == pytest.approx(0.3, abs=0.02)
    assert series.distribution(np.array([np.nan])) == {}


@given(runs=st.integers(0, 100_000))
def test_budget_shrinks_and_never_vanishes(runs: int) -> None:
    budget = series.Budget.of(runs)
    assert 150 <= budget.requests <= 2000
    assert 60 <= budget.bins <= 240


def test_without_arrays_the_tables_remain(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 4, 3.0)
    (tmp_path / "a.npz").write_bytes(b"not an archive")
    page = page_of(samples.document(run), base=tmp_path)
    assert page.row("ttft")[0][0] == run["metrics"]["ttft"]["mean"]
    assert page.data["figures"] == []
    assert "The arrays of this run are not there" in page.text


def test_gauges_that_are_not_there_are_not_drawn(tmp_path: Path) -> None:
    page = page_of(
        samples.document(samples.make_run(tmp_path, "a", 4, 3.0, gauges=False)), base=tmp_path
    )
    assert page.figures("kv") == []
    assert set(page.figures("flight")[0]["data"]["flight"]["what"]) == {"in flight (client)"}
    assert "no readings of the server's own gauges" in page.text


def test_two_engines_stand_side_by_side(tmp_path: Path) -> None:
    documents, bases = [], []
    for engine, speed in (("vllm", 1.0), ("tensorrt-llm", 1.4)):
        bases.append(tmp_path / engine)
        documents.append(samples.capstone(bases[-1], engine=engine, emulated=False, speed=speed))
    page = page_of(*documents, base=bases)
    assert "Side by side" in page.text
    runs = [document["runs"][0] for document in documents]
    assert [run["metrics"]["ttft"]["p95"] for run in runs] in page.row("ttft.p95")
    first, second = (run["metrics"]["output_throughput"] for run in runs)
    assert f"× {second / first:.2f}" in page.text
    differing = [name for name, _ in page.rows if name == "engine"]
    assert differing
    assert len(page.figures("latency_compare")) == 5
    points = page.figures("throughput_compare")[0]["data"]["points"]
    assert set(points["variant"]) == {"vllm", "tensorrt-llm"}


def test_nights_become_a_history(tmp_path: Path) -> None:
    documents = [
        samples.document(
            samples.make_run(
                tmp_path, f"n{night}", 8, 3.0, seed=night, wall=1.79e9 + 86400 * night,
                bounds=(("output_throughput", ">=", 300.0 if night < 6 else 1e6),),
            )
        )
        for night in range(7)
    ]  # fmt: skip
    page = page_of(*reversed(documents), base=tmp_path)
    assert "History: 7 runs of the same measurement" in page.text
    points = page.figures("throughput_trend")[0]["data"]["points"]
    assert points["v"] == [d["runs"][0]["metrics"]["output_throughput"] for d in documents]
    assert points["kind"] == ["passed"] * 6 + ["failed"]
    assert "Of 7 results of the test: 1 failed, 6 passed." in page.text


def test_baseline_history_band_and_distribution(tmp_path: Path) -> None:
    from pytest_llmserve.verdict.baseline_file import (
        Accepted,
        Baseline,
        LoadBaseline,
        StoredRun,
        baseline_path,
        update,
    )
    from pytest_llmserve.verdict.sketch import sketch

    runs = [samples.make_run(tmp_path, f"r{i}", 8, 4.0, seed=i) for i in range(8)]
    stored = []
    for i, run in enumerate(runs[:-1]):
        record = series.read_record(tmp_path, run["events"])
        assert record is not None
        found = series.latencies(record, run["metrics"]["window"])
        stored.append(
            StoredRun(
                id=f"{i:012x}", time=f"2026-10-{i + 1:02d}T03:00:00+00:00", duration=4.0,
                metrics={
                    "output_throughput": run["metrics"]["output_throughput"],
                    "ttft.p95": run["metrics"]["ttft"]["p95"],
                },
                samples={}, uncertified=(), fingerprint=run["fingerprint"], validity={},
                sketch={name: sketch(values) for name, values in found.items()},
            )
        )  # fmt: skip
    now = runs[-1]
    facts = now["fingerprint"]
    root = tmp_path / "baselines"
    path = baseline_path(root, facts["hardware"], facts["model"], facts["server"], now["test"])
    accepted = Accepted(stored[1].id, "2026-10-02", f"new clocks {BAD}", {})
    load = LoadBaseline({}, (stored[1].id,), (accepted,), tuple(stored))
    update(
        path, root,
        lambda _: Baseline(now["test"], facts["hardware"], facts["model"], facts["server"], True,
                           {facts["load"]: load}),
    )  # fmt: skip
    now["fingerprint"] = {**facts, "driver": "580.1"}
    # A run that was stored itself is drawn against what was there before it.
    third = page_of(samples.document(runs[3]), base=tmp_path, baselines=root)
    points = third.figures("throughput_trend")[0]["data"]["points"]
    assert points["v"] == [run["metrics"]["output_throughput"] for run in runs[:4]]
    assert points["kind"][-1] == "this run"
    page = page_of(samples.document(now), base=tmp_path, baselines=root)
    trend = page.figures("throughput_trend")[0]["data"]
    values = [run["metrics"]["output_throughput"] for run in runs]
    assert trend["points"]["v"] == values
    assert trend["points"]["kind"][1] == "origin"
    assert trend["points"]["kind"][-1] == "this run"
    logs = np.log(values[1:-1])  # since the accepted change
    assert trend["band"]["middle"][0] == pytest.approx(math.exp(logs.mean()))
    assert trend["band"]["low"][0] < min(values[1:-1])
    assert trend["band"]["high"][0] > max(values[1:-1])
    assert trend["accepted"]["i"] == [2]
    assert f"Accepted at run 2 (2026-10-02): new clocks {BAD}." in page.text
    band = page.figures("distribution")[0]["data"]["band"]
    assert all(low <= high for low, high in zip(band["low"], band["high"], strict=True))
    assert max(band["share"]) <= 1 - 1 / 64
    assert ("driver", []) in page.rows
    assert "changed" in page.text


def test_the_extra_is_named_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install pytest-llmserve\[report\]"):
        html.write_report(tmp_path / "r.html", [], base=tmp_path)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = samples.make_run(tmp_path, "a", 4, 3.0)
    html.write_report(tmp_path / "r.html", [samples.document(run)], base=tmp_path)
    assert (tmp_path / "r.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(ConfigError, match="cannot be written"):
        html.write_report(tmp_path / "no/r.html", [samples.document(run)], base=tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", charts.KINDS)
def test_charts_draw_without_a_browser(kind: str, capstone: Any) -> None:
    found = capstone[2].figures(kind)
    if not found:  # kinds that a single capstone does not need
        columns = {"x": [1, 2], "v": [0.1, 0.2], "variant": ["a", "b"], "load": ["1", "2"],
                   "text": ["x", "y"], "i": [1, 2], "kind": ["passed", "failed"],
                   "when": ["", ""]}  # fmt: skip
        readings = {"t": [0.0, 1.0], "v": [1e9, 2e9]}
        data = {"points": columns, "readings": readings}
        found = [{"title": "T", "data": data, "emulated": True}]
    figure = found[0]
    drawn = charts.svg(
        charts.Figure(kind, figure["title"], "", figure["data"], True, figure.get("params", {}))
    )
    assert drawn.startswith("<svg")
    assert "emulated" in drawn
    assert "@" not in drawn.replace("@font-face", "")  # every colour name was resolved


@given(st.text(), st.sampled_from(SECRETS))
def test_clean_leaves_nothing_unseen(text: str, secret: str) -> None:
    shown = clean(f"{text} api_key={secret} https://u:{secret}@h/ {text}")
    assert secret not in shown
    assert all(c.isprintable() or c == "\ufffd" for c in shown if ord(c) < 0xA0)
    assert shown.encode()


@pytest.mark.parametrize(
    "text",
    [
        "time to first token: 0.3 s"[:20],
        "prompt_tokens=128",
        "client's and server's token counts agree",
        "output tokens 5, tokens/s 300",
        "token_source: events",
    ],
)
def test_clean_keeps_what_is_no_secret(text: str) -> None:
    assert clean(text) == text


def test_values_of_secret_fields_are_hidden() -> None:
    assert clean_value("args.api-key", "abc") == HIDDEN
    assert clean_value("HF_TOKEN", "abc") == HIDDEN
    assert clean_value("args.max-num-seqs", 64) == "64"
    assert clean_value("emulated", True) == "yes"
    assert clean_value("driver", None) == "–"
