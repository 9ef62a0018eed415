"""Two servers measured in turn and compared, also where one GPU holds only one of them."""

import json
import os

import pytest

SERVERS = """
def served(**options):
    return factories.llm_server(engine="emulator", model="Qwen3-0.6B", gpus={gpus}, emulation=dict(
        hardware="l4", model="qwen3-0.6b", weights="bf16", kv="bf16", options=options))

serial = served(batching="serial")
batched = served()
load_serial = factories.load("serial")
load_batched = factories.load("batched")
"""

BODY = """
from pytest_llmserve import factories
{servers}
def test_batching(ab, load_serial, load_batched):
    pairs = ab(load_serial, load_batched, closed_loop(users=4), pairs={pairs}, **SHORT)
    {check}
"""


def run_ab(project, check, pairs=3, gpus=0, arguments=()):
    servers = SERVERS.format(gpus=gpus)
    return project(BODY.format(servers=servers, pairs=pairs, check=check)).runpytest(*arguments)


def test_continuous_batching_is_faster_than_serial(project, pytester):
    check = 'ab.check(pairs, at_least("output_throughput", 1.2), at_most("total_throughput", 9))'
    arguments = ("--llmserve-json=out.json", "--llmserve-benchmark-json=speed.json")
    result = run_ab(project, check, arguments=arguments)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  runs of one load (EMULATED)",
            "    A * 4 * tok/s*",
            "    B * 4 * tok/s*",
            "    B/A output_throughput *≥ 1.20*pass",
            "    B/A total_throughput *≤ 9 *pass",
            "verdicts: 1 pass",
        ]
    )
    runs = json.loads((pytester.path / "out.json").read_text())["runs"]
    assert [run["label"] for run in runs] == list("ABBAAB")
    seeds = [run["load"]["seed"] for run in runs]
    assert (seeds[0], seeds[2], seeds[4]) == (seeds[1], seeds[3], seeds[5])
    assert len(set(seeds)) == 3
    (ratio, _) = runs[-1]["verdicts"]
    a, b = ([r["metrics"]["output_throughput"] for r in runs if r["label"] == s] for s in "AB")
    assert ratio["measured"] == pytest.approx(
        (b[0] * b[1] * b[2] / (a[0] * a[1] * a[2])) ** (1 / 3)
    )
    exported = json.loads((pytester.path / "speed.json").read_text())["benchmarks"]
    assert [b["stats"]["rounds"] for b in exported] == [3, 3]


def test_what_is_not_reached_fails_and_what_is_worse_fails(project):
    result = run_ab(project, 'ab.check(pairs, at_least("output_throughput", 50))')
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["fail: B/A output_throughput >= 50: *of 3 pairs*"])
    turned = 'ab.check([(b, a) for a, b in pairs], metrics=["output_throughput"])'
    worse = run_ab(project, turned)
    worse.assert_outcomes(failed=1)
    worse.stdout.fnmatch_lines(["fail: B/A output_throughput: *worse than noise and the floor*"])


def test_two_pairs_are_inconclusive(project):
    result = run_ab(project, 'ab.check(pairs, at_least("output_throughput", 1.2))', pairs=2)
    result.stdout.fnmatch_lines(["*2 pairs: 1 more is needed", "*1 inconclusive*"])


def test_servers_take_turns_on_a_gpu_that_holds_one(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-of-test-{os.getpid()}")
    check = """print("PIDS", *(run.server.pid for pair in pairs for run in pair))
    ab.check(pairs, at_least("output_throughput", 1.2))"""
    result = run_ab(project, check, gpus=1, arguments=("-s",))
    result.assert_outcomes(passed=1)
    (line,) = (line for line in result.outlines if "PIDS" in line)
    a1, b1, a2, b2, a3, b3 = line.split("PIDS")[1].split()
    # A B B A A B: both of a turn have one server, and none lived on beside the other.
    assert b1 == b2
    assert a2 == a3
    assert len({a1, b1, a2, b3}) == 4


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("ab(load_serial, load_batched, closed_loop(1), pairs=0)", "pairs must be a whole number"),
        ("ab(load_serial, load_batched, closed_loop(1), seed=1)", "a seed of its own"),
        ("ab(load_serial, 3, closed_loop(1))", "3 is no load fixture"),
        ("ab.check([])", "without a run proves nothing"),
    ],
)
def test_wrong_calls_are_one_sentence(project, call, sentence):
    servers = SERVERS.format(gpus=0).replace("load_batched =", "load_other =")
    servers += 'load_batched = factories.load("serial")\n'
    body = f"from pytest_llmserve import factories\n{servers}\n"
    body += f"def test_it(ab, load_serial, load_batched):\n    {call}\n"
    result = project(body).runpytest()
    result.assert_outcomes(failed=1)
    assert sentence in result.stdout.str()
