"""Fingerprints: what is in them, what is not, and what their differences mean."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop, open_loop
from pytest_llmserve.servers import Emulation, Server, ServerConfig
from pytest_llmserve.verdict.fingerprint import (
    comparable,
    differences,
    fingerprint,
    load_key,
    model_name,
)

GPU = {
    "slug": "nvidia-h200",
    "cpu": "Some CPU",
    "cores": 16,
    "memory": 128 << 30,
    "gpu": "NVIDIA H200",
    "gpu_count": 1,
    "driver": "580.1",
    "compute_capability": "9.0",
}
PLAN = LoadPlan(closed_loop(30))


def server(
    endpoint="http://127.0.0.1:8000", effective=None, emulated=False, version="0.32", **config
):
    settings = {"name": "qwen", "engine": "vllm", "model": "Qwen/Qwen3-8B", **config}
    return Server(
        ServerConfig(**settings),
        endpoint,
        "qwen3",
        settings["engine"],
        version,
        effective or {},
        emulated,
        pid=4711,
        api_key="sk-very-secret",
    )


def take(srv=None, plan=PLAN, hardware=GPU, **more):
    return fingerprint(srv or server(), plan, hardware, metrics_version=1, **more)


def test_it_is_flat_sorted_and_json():
    found = take(server(args={"max_num_seqs": 64, "speculative-config": {"method": "ngram"}}))
    assert list(found) == sorted(found)
    assert all(isinstance(v, (str, int, float, bool)) for v in found.values())
    assert json.loads(json.dumps(found)) == found
    assert found["args.max-num-seqs"] == 64
    assert found["args.speculative-config.method"] == "ngram"
    assert found["gpu"] == "NVIDIA H200"


def test_places_and_secrets_are_left_out():
    found = take(
        server(
            endpoint="http://127.0.0.1:54321",
            args={
                "port": 54321,
                "host": "127.0.0.1",
                "api-key": "sk-very-secret",
                "hf_token": "hf_abc",
            },
            effective={
                "model": "/home/someone/models/tiny",
                "download_dir": "/scratch/x",
                "pid": 4711,
            },
        )
    )
    text = json.dumps(found)
    for hidden in ("sk-very-secret", "hf_abc", "54321", "4711", "someone", "scratch"):
        assert hidden not in text
    assert found["args.model"] == "tiny"


def test_what_the_engine_reports_wins_over_what_was_asked():
    found = take(server(args={"max-num-seqs": 64}, effective={"max_num_seqs": 32}))
    assert found["args.max-num-seqs"] == 32


def test_emulated_hardware_is_the_imitated_one():
    srv = server(engine="emulator", emulated=True, emulation=Emulation(hardware="dgx-spark"))
    found = take(srv)
    assert found["hardware"] == "emulated-dgx-spark"
    assert found["emulated"] is True
    assert "gpu" not in found
    assert "cpu" not in found
    assert not comparable(found, take())


def test_a_remote_endpoint_is_not_this_machine():
    attached = server(endpoint="http://10.0.0.7:8000", name="attach", engine="attach", gpus=0)
    assert take(attached)["hardware"] == "remote"
    named = dataclasses.replace(
        attached, config=dataclasses.replace(attached.config, hardware="DGX Spark")
    )
    assert take(named)["hardware"] == "dgx-spark"


def test_a_cpu_server_on_a_gpu_machine_is_a_cpu_server():
    found = take(server(gpus=0))
    assert found["hardware"] == "cpu-some-16c"
    assert "gpu" not in found


def test_the_cpu_must_match_only_where_it_computes():
    other = {**GPU, "cpu": "Other CPU"}
    assert comparable(take(), take(hardware=other))
    assert not comparable(take(server(gpus=0)), take(server(gpus=0), hardware=other))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"hardware": {**GPU, "driver": "590.2"}}, "should"),
        ({"hardware": {**GPU, "gpu": "NVIDIA H100"}}, "must"),
        ({"srv": server(version="0.33")}, "should"),
        ({"srv": server(engine="sglang")}, "must"),
        ({"srv": server(model="Qwen/Qwen3-4B")}, "must"),
        ({"srv": server(name="renamed")}, "info"),
        ({"srv": server(args={"max-num-seqs": 64})}, "must"),
        ({"plan": LoadPlan(closed_loop(31))}, "must"),
        ({"srv": server(args={"seed": 7})}, "info"),
        ({"srv": server(effective={"num_gpu_blocks": 4711})}, "should"),
        ({"srv": server(effective={"faults": ["throttle"]})}, "info"),
    ],
)
def test_classes(change, kind):
    found = differences(take(), take(**change))
    assert found
    assert found[0].kind == kind
    assert comparable(take(), take(**change)) == (kind != "must")


def test_an_argument_new_in_another_version_is_named_but_compared():
    old = take(server(version="0.32"))
    new = take(server(version="0.33", effective={"async-scheduling": True}))
    assert comparable(old, new)
    assert any(str(d) == "args.async-scheduling: none → True" for d in differences(old, new))


def test_the_same_load_whatever_its_duration_and_seed():
    same = dataclasses.replace(PLAN, duration=5.0, seed=9, warmup=3, drain=1.0)
    assert load_key(same) == load_key(PLAN)
    others = [
        LoadPlan(closed_loop(30, think_time=1.0)),
        LoadPlan(open_loop(30)),
        LoadPlan(open_loop(30, arrivals="constant")),
        LoadPlan(closed_loop(30), Workload(prompt_tokens=129)),
        LoadPlan(closed_loop(30), Workload(api="chat")),
        LoadPlan(closed_loop(30), Workload(shared_prefix=64)),
    ]
    assert len({load_key(p) for p in [PLAN, *others]}) == 1 + len(others)


@pytest.mark.parametrize(
    ("configured", "name"),
    [
        ("/home/u/models/tiny/", "tiny"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("", "qwen3"),
        ("./m", "m"),
    ],
)
def test_model_names(configured, name):
    assert model_name(server(model=configured)) == name


VALUES = st.sampled_from([None, 0, 1, 2.5, "a", "b", False])
PRINTS = st.dictionaries(
    st.sampled_from(["gpu", "driver", "python", "args.x", "load", "novel"]), VALUES
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PRINTS, PRINTS)
def test_differences_are_symmetric_complete_and_none_with_itself(a, b):
    assert differences(a, a) == ()
    forth = {d.field: (d.left, d.right, d.kind) for d in differences(a, b)}
    back = {d.field: (d.right, d.left, d.kind) for d in differences(b, a)}
    assert forth == back
    assert set(forth) == {k for k in {*a, *b} if a.get(k) != b.get(k)}
    assert comparable(a, b) == comparable(b, a)


@pytest.mark.parametrize(
    ("effective", "quantization"),
    [
        ({"quantization": None, "dtype": "torch.bfloat16"}, "bf16"),
        ({"quantization": None, "dtype": "torch.float16"}, "fp16"),
        ({"quantization": "fp8", "dtype": "torch.bfloat16"}, "fp8"),
        ({"dtype": "auto"}, None),
        ({}, None),
    ],
)
def test_weights_that_are_not_quantized_have_their_types_name(effective, quantization):
    assert take(server(effective=effective)).get("quantization") == quantization


def test_power_limit_and_clocks_are_told_and_do_not_part_runs():
    limited = {**GPU, "power_limit": 500.0, "max_sm_clock": 1.98e9}
    left, right = take(hardware={**GPU, "power_limit": 700.0}), take(hardware=limited)
    assert right["power_limit"] == 500.0
    assert comparable(left, right)
    assert {d.field for d in differences(left, right)} == {"power_limit", "max_sm_clock"}
