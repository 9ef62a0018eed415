"""What an emulated run says beside the client's own figures: server metrics, roofline, no GPU."""

import json

import jsonschema
import pytest

BODY = """
@quick
def test_it(load, slo):
    run = load(closed_loop(users=4), **SHORT)
    slo.check(
        run,
        at_most("server.preemptions", 0),
        at_least("server.running.max", 2),
        at_most("server.kv_usage.last", 0.01),
        at_least("server.output_throughput", 1),
        at_least("roofline", 0.001),
        at_most("roofline", 1),
        at_least("server.acceptance_rate", 0.5),
        at_most("energy_per_token", 100),
    )
"""


def test_server_metrics_and_roofline_are_in_the_result(project, schema):
    pytester = project(BODY)
    result = pytester.runpytest("--llmserve-json=out.json")
    assert result.ret == 0
    document = json.loads((pytester.path / "out.json").read_text())
    jsonschema.Draft202012Validator(schema("result")).validate(document)
    (run,) = document["runs"]
    metrics, server = run["metrics"], run["metrics"]["server"]
    assert run["emulated"]
    assert server["running"]["max"] <= 4
    assert server["ttft"]["mean"] <= metrics["ttft"]["max"]
    # Both counted the same tokens; the server's rate is interpolated between its readings.
    ratio = server["output_throughput"] / metrics["output_throughput"]
    assert 0.5 < ratio < 1.5
    series = run["server_metrics"]["series"]
    assert series["generation_tokens"] == sorted(series["generation_tokens"])
    assert series["time"][0] < metrics["window"]["start"]
    assert series["time"][-1] > metrics["window"]["end"]

    roofline = run["roofline"]
    assert roofline["share"] == metrics["roofline"]
    rate = roofline["share"] * roofline["ceiling"]
    assert rate == pytest.approx(metrics["output_throughput"])
    assert (roofline["hardware"], roofline["weights"]) == ("NVIDIA H100 SXM 80 GB", "bf16")
    assert any("3.35 TB/s" in line for line in roofline["lines"])

    assert run["telemetry"] == {"reason": "the engine is emulated, no GPU computes"}
    assert "gpu" not in metrics
    outcomes = {v["objective"]: v["verdict"] for v in run["verdicts"]}
    undecided = {name for name, outcome in outcomes.items() if outcome == "inconclusive"}
    assert undecided == {"server.acceptance_rate >= 0.5", "energy_per_token <= 100"}
    assert set(outcomes.values()) == {"pass", "inconclusive"}


SPECULATING = """
@pytest.mark.llmserve(
    engine="emulator",
    emulation={"hardware": "h100", "model": "qwen3-0.6b", "weights": "bf16", "kv": "bf16",
               "options": {"num-speculative-tokens": 3, "acceptance": 0.7, "overhead": 0.005}},
)
def test_it(load, slo):
    run = load(closed_loop(users=2), **SHORT)
    slo.check(
        run,
        at_least("server.accepted_length", 1.5),
        at_most("server.accepted_length", 4),
        at_least("server.acceptance_rate", 0.2),
    )
    (flops,) = [line for line in run.roofline["lines"] if line.startswith("FLOPs a step")]
    assert "sequences × 3." in flops or "sequences × 2." in flops or "sequences × 4" in flops
    (ceiling,) = [line for line in run.roofline["lines"] if line.startswith("ceiling")]
    assert f" × {run['server.accepted_length']:.3g} tokens / " in ceiling
"""


def test_speculation_is_measured_and_credited(project):
    result = project(SPECULATING).runpytest()
    result.assert_outcomes(passed=1)
