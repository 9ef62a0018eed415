"""`llmserve compare`: all kinds of input, all formats, exit status, what may not be compared."""

import json
import math

import pytest
from jsonschema import Draft202012Validator

from pytest_llmserve.cli import main
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.verdict.baseline_file import (
    Baseline,
    LoadBaseline,
    StoredRun,
    encode,
    schema_validator,
)
from pytest_llmserve.verdict.compare import FORMATS, compare_files, load_side

NOISE = (0.0, 0.008, -0.007, 0.004, -0.005, 0.002)


def distribution(value, n=1000):
    names = ("mean", "p50", "p90", "p95", "p99", "max")
    return {**dict.fromkeys(names, value), "n": n, "ci": {}, "certified": list(names[1:5])}


def run(factor=1.0, *, test="t.py::test_x", ok=True, **fingerprint):
    facts = {"emulated": False, "engine": "vllm", "load": "closed-30", **fingerprint}
    return {
        "test": test,
        "server": "qwen",
        "engine": facts["engine"],
        "model": "m",
        "emulated": facts["emulated"],
        "load": {"kind": "closed", "users": 30, "workload": {}, "duration": 30.0, "seed": 1},
        "metrics": {
            "window": {"start": 0.0, "end": 30.0, "duration": 30.0},
            **{
                name: distribution(0.1 / factor)
                for name in ("ttft", "tpot", "itl", "e2e", "send_delay", "client_lag")
            },
            "user_throughput": distribution(30 * factor),
            "output_throughput": 1000 * factor,
            "total_throughput": 2000 * factor,
            "request_throughput": 8 * factor,
            "concurrency": {"mean": 30.0, "max": 30},
            "requests": 240,
            "errors": {},
        },
        "validity": [{"check": "concurrency", "ok": ok, "detail": "30 of 30"}],
        "verdicts": [],
        "verdict": None if ok else "invalid",
        "fingerprint": facts,
        "events": None,
    }


def result(path, *runs):
    content = {
        "schema": "llmserve-result/1",
        "metrics_version": 1,
        "emulated": any(r["emulated"] for r in runs),
        "fingerprint": {},
        "runs": list(runs),
    }
    Draft202012Validator(schema_validator("result").schema).validate(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def before(tmp_path):
    return result(tmp_path / "a.json", *(run(math.exp(n)) for n in NOISE))


def found(compared):
    return {row.metric: row.finding for row in compared.rows}


def test_the_same_is_no_regression_and_slower_is_one(tmp_path, before, capsys):
    same = result(tmp_path / "same.json", run(1.001))
    slow = result(tmp_path / "slow.json", *(run(0.85 * math.exp(n)) for n in NOISE[:3]))
    assert main(["compare", str(before), str(same)]) == 0
    assert main(["compare", str(before), str(slow)]) == 1
    said = capsys.readouterr().out
    assert "regression" in said
    assert "0.850" in said


def test_one_slow_run_is_suspected_not_a_regression(tmp_path, before):
    slow = result(tmp_path / "slow.json", run(0.85))
    compared = compare_files(before, slow)
    assert set(found(compared).values()) == {"suspected"}
    assert "1 more runs of B would decide" in compared.rows[0].reason


def test_few_runs_are_inconclusive(tmp_path):
    a, b = result(tmp_path / "a.json", run()), result(tmp_path / "b.json", run(0.5))
    compared = compare_files(a, b)
    assert set(found(compared).values()) == {"inconclusive"}
    assert compared.rows[0].ratio == pytest.approx(0.5)
    assert main(["compare", str(a), str(b)]) == 0


def test_folders_are_runs(tmp_path):
    for side, factor in (("a", 1.0), ("b", 0.8)):
        (tmp_path / side).mkdir()
        for number, noise in enumerate(NOISE):
            result(tmp_path / side / f"{number}.json", run(factor * math.exp(noise)))
    compared = compare_files(tmp_path / "a", tmp_path / "b")
    assert compared.rows[0].a_runs == compared.rows[0].b_runs == 6
    assert compared.regressed


def test_a_baseline_may_be_either_side(tmp_path, before):
    stored = [
        StoredRun(
            f"{i:012x}", "2026-11-23T00:00:00+00:00", 30.0,
            {"output_throughput": 1000 * math.exp(n), "ttft.p95": 0.1, "tpot.p50": 0.1}, {}, (), {},
            {"engine": "vllm", "emulated": False, "load": "closed-30"}, {},
        )
        for i, n in enumerate(NOISE)
    ]  # fmt: skip
    loads = {"closed-30": LoadBaseline({}, (), (), tuple(stored))}
    path = tmp_path / "baseline.json"
    path.write_text(encode(Baseline("t.py::test_x", "h", "m", "qwen", False, loads)))
    assert found(compare_files(path, before))["output_throughput"] == "no_regression"
    assert found(compare_files(before, path))["output_throughput"] == "no_regression"


def test_what_measured_something_else_is_inconclusive_unless_meant(tmp_path, before):
    other = result(tmp_path / "b.json", *(run(0.8 * math.exp(n), engine="sglang") for n in NOISE))
    compared = compare_files(before, other)
    assert set(found(compared).values()) == {"inconclusive"}
    assert "engine: vllm → sglang" in compared.rows[0].reason
    assert compare_files(before, other, across=["engine"]).regressed


def test_emulated_and_real_are_never_compared(tmp_path, before):
    emulated = result(tmp_path / "b.json", *(run(emulated=True) for _ in NOISE))
    compared = compare_files(before, emulated)
    assert set(found(compared).values()) == {"inconclusive"}
    for pattern in ("emulated", "*"):
        with pytest.raises(ConfigError, match="never compared"):
            compare_files(before, emulated, across=[pattern])
    assert compared.emulated
    assert all("EMULATED" in render(compared) or name == "json" for name, render in FORMATS.items())


def test_invalid_runs_are_left_out_and_named(tmp_path, before):
    b = result(tmp_path / "b.json", run(), run(0.1, ok=False))
    compared = compare_files(before, b)
    assert compared.rows[0].b_runs == 1
    assert "b.json: an invalid run of t.py::test_x is left out" in compared.notes


def test_tests_on_one_side_only_are_named(tmp_path, before):
    b = result(tmp_path / "b.json", run(), run(test="t.py::test_new"))
    assert any("only in b.json: t.py::test_new" in note for note in compare_files(before, b).notes)


def test_formats(tmp_path, before):
    slow = result(tmp_path / "b.json", *(run(0.8, test="t.py::test_x") for _ in range(3)))
    compared = compare_files(before, slow)
    text = {name: render(compared) for name, render in FORMATS.items()}
    assert (
        "| t.py::test_x closed-30 | output_throughput | 1,000 tok/s | 800.0 tok/s |"
        in (text["markdown"])
    )
    content = json.loads(text["json"])
    assert content["schema"] == "llmserve-comparison/1"
    assert content["regressed"] is True
    assert content["rows"][0]["ratio"] == pytest.approx(0.8, rel=0.01)
    assert "<script" not in text["html"]
    assert "http" not in text["html"]
    lines = text["text"].splitlines()[2:6]
    assert (
        len(
            {
                line.index(metric)
                for line, metric in zip(lines[1:], ("output_", "ttft", "tpot"), strict=True)
            }
        )
        == 1
    )


def test_html_escapes_names(tmp_path):
    a = result(tmp_path / "a.json", run(test="<script>alert(1)</script>"))
    assert "<script" not in FORMATS["html"](compare_files(a, a))


VLLM = {
    "model_id": "qwen", "max_concurrency": 30, "duration": 10.0, "completed": 100,
    "total_input_tokens": 1, "total_output_tokens": 10, "request_throughput": 5.0,
    "output_throughput": 900.0, "total_token_throughput": 1500.0, "mean_ttft_ms": 120.0,
    "median_ttft_ms": 100.0, "p99_ttft_ms": 400.0, "mean_tpot_ms": 25.0, "median_tpot_ms": 24.0,
    "p99_tpot_ms": 40.0, "median_itl_ms": 23.0,
}  # fmt: skip
GUIDELLM = {
    "benchmarks": [
        {
            "config": {"strategy": {"type_": "concurrent", "streams": 30}},
            "metrics": {
                "time_to_first_token_ms": {"successful": {"mean": 50, "percentiles": {"p95": 80}}},
                "inter_token_latency_ms": {"successful": {"mean": 20, "percentiles": {"p50": 19}}},
                "output_tokens_per_second": {"successful": {"mean": 800}},
            },
        }
    ]
}
AIPERF = {
    "time_to_first_token": {"unit": "ms", "avg": 50.0, "p95": 80.0},
    "inter_token_latency": {"unit": "ms", "avg": 20.0, "p50": 19.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 800.0},
}


def values(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    side = load_side(path)
    (group,) = side.groups.values()
    return {k: v[0] for k, v in group.values.items()}, side


def test_vllm_bench_serve(tmp_path):
    got, side = values(tmp_path, VLLM)
    assert got["tpot.p50"] == pytest.approx(0.024)
    assert got["itl.p50"] == pytest.approx(0.023)
    assert got["vllm:ttft.p99"] == pytest.approx(0.4)
    assert got["vllm:output_throughput"] == 900
    assert not {"ttft.p50", "output_throughput"} & set(got)
    assert any("vllm:output_throughput is not our output_throughput" in n for n in side.notes)


def test_guidellm(tmp_path):
    got, side = values(tmp_path, GUIDELLM)
    assert got["guidellm:ttft.p95"] == pytest.approx(0.08)
    assert got["guidellm:output_throughput"] == 800
    assert all(":" in name for name in got)
    assert any("weights each request's mean" in note for note in side.notes)
    assert list(side.groups) == ["guidellm: concurrent 30"]


def test_aiperf(tmp_path):
    got, _ = values(tmp_path, AIPERF)
    assert got["tpot.p50"] == pytest.approx(0.019)
    assert got["aiperf:ttft.p95"] == pytest.approx(0.08)


def test_another_tool_meets_ours_only_where_the_meaning_is_the_same(tmp_path, before):
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(VLLM))
    assert set(found(compare_files(before, path))) == {"tpot.p50", "tpot.mean"}
    both = found(compare_files(path, path))
    assert "vllm:output_throughput" in both
    assert "vllm:ttft.p99" in both


def test_two_tools_without_common_meaning_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GUIDELLM))
    (tmp_path / "b.json").write_text(json.dumps(VLLM))
    with pytest.raises(ConfigError, match="no metric of the same meaning"):
        compare_files(tmp_path / "a.json", tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("{}", "of no kind that is known"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": "llmserve-result/1"}', "'metrics_version' is missing"),
        ('{"schema": "llmserve-baseline/9"}', "llmserve-baseline/9"),
    ],
)
def test_bad_files_are_one_sentence_and_status_2(tmp_path, before, capsys, text, said):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert main(["compare", str(before), str(bad)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(bad) in error
    assert error.count("\n") == 1


def test_an_empty_folder_is_refused(tmp_path, before, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(before), str(tmp_path / "empty")]) == 2
    assert "has no .json file" in capsys.readouterr().err


def test_metrics_may_be_named(before):
    assert set(found(compare_files(before, before, metrics=["e2e.p99"]))) == {"e2e.p99"}
    with pytest.raises(ConfigError, match="did you mean"):
        compare_files(before, before, metrics=["e2e.p9"])
