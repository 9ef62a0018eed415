"""When requests are to arrive, and how long they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.load.plan import (
    Lengths,
    LoadPlan,
    OpenLoop,
    Target,
    Workload,
    changing_rate,
    closed_loop,
    open_loop,
    plan_from_dict,
    plan_to_dict,
    trace,
)
from pytest_llmserve.load.requests import Requests
from pytest_llmserve.load.schedule import arrival_times, user_starts
from pytest_llmserve.load.tokens import Prompts

POOL = tuple(range(500, 700))


def times(arrivals, duration=200.0, seed=0):
    return arrival_times(LoadPlan(arrivals, duration=duration, seed=seed))


def test_users_start_spread_over_the_ramp():
    plan = LoadPlan(closed_loop(4, ramp=2.0))
    assert list(user_starts(plan)) == [0.0, 0.5, 1.0, 1.5]
    assert LoadPlan(closed_loop(4), duration=20.0).lead == 4.0
    assert LoadPlan(closed_loop(4), duration=600.0).lead == 10.0
    assert LoadPlan(closed_loop(1)).lead == 0.0


@pytest.mark.parametrize("arrivals", ["poisson", "constant", "gamma"])
def test_seeded_ascending_and_inside(arrivals):
    one = times(open_loop(20.0, arrivals=arrivals, lead_in=5.0), seed=1)
    again = times(open_loop(20.0, arrivals=arrivals, lead_in=5.0), seed=1)
    assert np.array_equal(one, again)
    assert (np.diff(one) >= 0).all()
    assert one[0] >= 0
    assert one[-1] < 205.0
    assert len(one) == pytest.approx(4100, rel=0.1)
    if arrivals != "constant":
        other = times(open_loop(20.0, arrivals=arrivals, lead_in=5.0), seed=2)
        assert not np.array_equal(one[:100], other[:100])


def test_poisson_gaps_are_exponential():
    gaps = np.diff(times(open_loop(50.0, lead_in=0.0)))
    assert kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 1e-4


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_variance_asked_for(burstiness):
    gaps = np.diff(times(open_loop(50.0, arrivals="gamma", burstiness=burstiness, lead_in=0.0)))
    assert kstest(gaps * 50, "gamma", args=(1 / burstiness, 0, burstiness)).pvalue > 1e-4


def test_steps_hold_their_rates():
    profile = changing_rate((0, 10), (20, 50), (40, 0), (60, 10), arrivals="constant", lead_in=10)
    found = times(profile, duration=80.0)
    counts = np.histogram(found, [0, 30, 50, 70, 90])[0]
    assert list(counts) == [300, 1000, 0, 200]


def test_a_ramp_rises_evenly():
    found = times(
        changing_rate((0, 0), (100, 20), between="ramp", arrivals="constant", lead_in=0), 100.0
    )
    assert len(found) == 1000
    # The integral of the rate, t²/10, has reached n at the n-th arrival.
    assert found**2 / 10 == pytest.approx(np.arange(1000), abs=1e-6)


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0.0, 30.0)),
        min_size=1,
        max_size=5,
        unique_by=lambda p: p[0],
    ),
    st.sampled_from(["step", "ramp"]),
    st.sampled_from(["constant", "poisson", "gamma"]),
)
def test_any_profile_gives_arrivals_in_order(profile, between, arrivals):
    loop = OpenLoop(1.0, arrivals, 2.0, profile=tuple(sorted(profile)), between=between)
    found = times(loop, duration=40.0)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-9).all()
    assert ((found >= 0) & (found <= 42.0 + 1e-6)).all()


def requests_of(plan, places, ids=POOL, phase=1):
    maker = Requests(Target("http://h", "m", token_ids=ids), plan, Prompts(ids=ids))
    made = [maker.make(phase, user, number) for user, number in places]
    return [(json.loads(raw.partition(b"\r\n\r\n")[2]), p, o) for raw, p, o in made]


def test_lengths_are_drawn_within_their_bounds():
    workload = Workload(
        prompt_lengths=Lengths("lognormal", 10, 500, 60, 0.8),
        output_lengths=Lengths("normal", 5, 50, 20, 8),
    )
    made = requests_of(LoadPlan(closed_loop(1), workload), [(0, n) for n in range(800)])
    prompts = np.array([len(body["prompt"]) for body, _, _ in made])
    outputs = np.array([body["max_tokens"] for body, _, _ in made])
    assert prompts.min() >= 10
    assert prompts.max() <= 500
    assert np.median(prompts) == pytest.approx(60, rel=0.15)
    assert outputs.mean() == pytest.approx(20, rel=0.1)
    assert [(p, o) for _, p, o in made] == list(zip(prompts, outputs, strict=True))
    uniform = Workload(output_lengths=Lengths("uniform", 1, 3))
    made = requests_of(LoadPlan(closed_loop(1), uniform), [(0, n) for n in range(100)])
    assert {body["max_tokens"] for body, _, _ in made} == {1, 2, 3}


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_conversation_goes_on_from_what_was_said(api):
    workload = Workload(10, 6, turns=3, api=api)
    ids = POOL if api == "completions" else ()
    plan = LoadPlan(closed_loop(2), workload)
    made = requests_of(plan, [(0, n) for n in range(4)], ids)
    assert [(want, out) for _, want, out in made] == [(10, 6), (26, 6), (42, 6), (10, 6)]
    if api == "chat":
        said = [body["messages"] for body, _, _ in made]
        assert [one["role"] for one in said[2]] == ["user", "assistant"] * 2 + ["user"]
    else:
        said = [body["prompt"] for body, _, _ in made]
        assert [len(prompt) for prompt in said] == [10, 26, 42, 10]
    assert said[1][: len(said[0])] == said[0]
    assert said[2][: len(said[1])] == said[1]
    assert said[3] != said[0]
    assert workload.longest_prompt == 42
    assert [workload.known_tokens(turn) for turn in range(3)] == [0, 10, 26]


def test_prefixes_in_groups():
    plan = LoadPlan(closed_loop(1), Workload(30, 1, shared_prefix=20, prefixes=3))
    made = requests_of(plan, [(0, n) for n in range(60)])
    assert len({tuple(body["prompt"][:20]) for body, _, _ in made}) == 3
    assert len({tuple(body["prompt"]) for body, _, _ in made}) == 60


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_trace_gives_times_and_lengths(tmp_path):
    mooncake = write(
        tmp_path,
        "m.jsonl",
        '{"timestamp": 3000, "input_length": 7, "output_length": 2, "hash_ids": [1]}\n'
        '{"timestamp": 1000, "input_length": 5, "output_length": 9}\n\n'
        '{"timestamp": 9000, "input_length": 5, "output_length": 9}\n',
    )
    plan = LoadPlan(trace(mooncake, scale=0.5), duration=3.0)
    assert list(arrival_times(plan)) == [0.0, 1.0]
    assert plan.lead == 0.0
    made = requests_of(plan, [(-1, 0), (-1, 1)])
    assert [(len(body["prompt"]), body["max_tokens"]) for body, _, _ in made] == [(5, 9), (7, 2)]
    plain = write(tmp_path, "p.jsonl", '{"at": 0}\n{"at": 2.5}\n')
    assert list(arrival_times(LoadPlan(trace(plain), duration=10))) == [0.0, 2.5]
    azure = write(
        tmp_path,
        "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319600,396,109\n",
    )
    found = LoadPlan(trace(azure), duration=10)
    assert arrival_times(found) == pytest.approx([0.0, 0.052])
    assert requests_of(found, [(-1, 1)])[0][1:] == (396, 109)
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(found)))) == found


def test_prompts_from_files(tmp_path):
    lines = write(
        tmp_path, "p.jsonl", '{"prompt": "say \\"hi\\"", "output_tokens": 3}\n{"prompt": "b"}\n'
    )
    shared = write(
        tmp_path,
        "s.json",
        json.dumps(
            [
                {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
                {"conversations": [{"from": "gpt", "value": "z"}]},
            ]
        ),
    )
    plan = LoadPlan(closed_loop(2), Workload(output_tokens=8, dataset=lines))
    made = requests_of(plan, [(0, 0), (0, 1), (0, 2)])
    assert {body["prompt"] for body, _, _ in made} == {'say "hi"', "b"}
    assert {body["prompt"]: (p, o) for body, p, o in made} == {'say "hi"': (-1, 3), "b": (-1, 8)}
    assert made[0] == made[2]
    plan = LoadPlan(closed_loop(1), Workload(dataset=shared, api="chat"))
    assert requests_of(plan, [(0, 5)])[0][0]["messages"] == [{"role": "user", "content": "x"}]
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan
    assert plan.workload.digest != LoadPlan(closed_loop(1), Workload(dataset=lines)).workload.digest


@pytest.mark.parametrize(
    ("name", "text", "make", "words"),
    [
        ("x.jsonl", "", trace, "no requests"),
        ("x.jsonl", "nonsense\n", trace, "line 1: write one JSON object"),
        ("x.jsonl", '{"at": 1}\n{"when": 2}\n', trace, "line 2: write `at`"),
        ("x.jsonl", '{"at": 1, "prompt_tokens": "many"}\n', trace, "prompt_tokens is 'many'"),
        ("x.csv", "TIMESTAMP,ContextTokens\n2023-01-01,1\n", trace, "line 2: an Azure trace"),
        ("x.jsonl", '{"text": "a"}\n', lambda f: Workload(dataset=f), "line 1: write the text"),
        ("x.json", '{"a": 1}', lambda f: Workload(dataset=f), "ShareGPT's form"),
        ("x.json", "[]", lambda f: Workload(dataset=f), "no prompts"),
        (None, "", trace, "cannot be read"),
        (None, "", lambda f: Workload(dataset=f), "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, text, make, words):
    file = write(tmp_path, name, text) if name else str(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match=words) as caught:
        make(file)
    assert str(caught.value).startswith(file)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: open_loop(1, burstiness=2),
        lambda: open_loop(1, arrivals="gamma", burstiness=0),
        lambda: OpenLoop(1, profile=((5, 1), (2, 1))),
        lambda: OpenLoop(1, profile=((0, -1),)),
        lambda: changing_rate((0, 0)),
        lambda: OpenLoop(1, between="jump"),
        lambda: Lengths("zipf", 1, 2),
        lambda: Lengths("uniform", 3, 2),
        lambda: Lengths("normal", 1, 2),
        lambda: Workload(turns=2, output_lengths=Lengths("uniform", 1, 2)),
        lambda: Workload(prompt_lengths=Lengths("uniform", 5, 9), shared_prefix=6),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"\w+\(.*\): .+"):
        wrong()
