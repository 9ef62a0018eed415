"""The arithmetic of a step: against the figures worked out by hand, and against common sense."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.emulator.catalog import (
    hardware_names,
    load_hardware,
    load_model,
    model_names,
)
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.metrics.roofline import (
    Batch,
    ModelShape,
    Precision,
    decode_ceiling,
    kv_bytes,
    kv_capacity,
    resident_bytes,
    step_flops,
    step_time,
    weight_bytes,
)

QWEN = load_model("qwen3-8b")
SPARK = load_hardware("dgx-spark")


def test_the_shape_of_qwen3_8b() -> None:
    assert QWEN.linear_params / 1e9 == pytest.approx(6.95, abs=0.005)
    assert QWEN.head_params / 1e9 == pytest.approx(0.622, abs=0.0005)
    assert QWEN.kv_elements == 73_728
    assert kv_bytes(QWEN, Precision(kv="bf16")) == 144 * 1024
    assert kv_bytes(QWEN, Precision(kv="fp8")) == 72 * 1024


@pytest.mark.parametrize(
    ("weights", "gigabytes", "at_20", "at_30", "at_512", "seventy_percent"),
    [
        ("bf16", 15.1, 361, 541, 503, 352),
        ("fp8", 8.2, 667, 1000, 878, 615),
        ("nvfp4", 5.15, 1060, 1590, 1303, 912),
    ],
)
def test_the_ceilings_of_the_headline(
    weights: str, gigabytes: float, at_20: int, at_30: int, at_512: int, seventy_percent: int
) -> None:
    precision = Precision(weights=weights, kv="fp8")
    assert weight_bytes(QWEN, precision) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert decode_ceiling(QWEN, SPARK, precision, 20, 0) == pytest.approx(at_20, abs=1)
    assert decode_ceiling(QWEN, SPARK, precision, 30, 0) == pytest.approx(at_30, abs=1)
    ceiling = decode_ceiling(QWEN, SPARK, precision, 30, 512)
    assert ceiling == pytest.approx(at_512, abs=1)
    assert 0.7 * ceiling == pytest.approx(seventy_percent, abs=1)


def test_a_step_of_the_headline_takes_what_its_bytes_take() -> None:
    precision = Precision("nvfp4", "fp8")
    step = step_time(QWEN, SPARK, precision, Batch.decode(30, 512))
    assert step.bound == "bandwidth"
    ceiling = decode_ceiling(QWEN, SPARK, precision, 30, 512)
    assert step.memory == pytest.approx(30 / ceiling / SPARK.bandwidth_efficiency)
    assert step.total == step.memory + SPARK.overhead


def test_a_long_prompt_is_bound_by_compute() -> None:
    prompt = Batch(tokens=2048, sampled=1, kv_read=2048, attended=2048 * 2049 // 2)
    step = step_time(QWEN, SPARK, Precision("bf16", "bf16"), prompt)
    assert step.bound == "compute"
    # Two FLOPs a weight and token, and attention on top, which is small at this length.
    assert 1.0 < step_flops(QWEN, prompt) / (2 * QWEN.linear_params * 2048) < 1.1


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("weights", ["bf16", "fp8", "nvfp4", "int4"])
def test_narrower_weights_are_never_more_bytes(name: str, weights: str) -> None:
    shape = load_model(name)
    narrow = weight_bytes(shape, Precision(weights=weights))
    assert narrow <= weight_bytes(shape, Precision(weights="bf16"))
    assert (resident_bytes(shape, Precision(weights=weights)) == narrow) is shape.tied


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.6), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19),
     ("qwen3-14b", 14.77), ("qwen3-32b", 32.76), ("llama-3.1-8b", 8.03)],
)  # fmt: skip
def test_the_parameters_are_those_of_the_model_cards(name: str, billions: float) -> None:
    shape = load_model(name)
    parameters = resident_bytes(shape, Precision(weights="bf16")) / 2
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


sizes = st.integers(1, 200)


@given(sequences=sizes, context=st.integers(0, 4000), more=st.integers(0, 4000),
       hardware=st.sampled_from(hardware_names()),
       weights=st.sampled_from(["bf16", "fp8", "nvfp4", "int4"]))  # fmt: skip
def test_more_context_never_makes_a_step_shorter(
    sequences: int, context: int, more: int, hardware: str, weights: str
) -> None:
    machine, precision = load_hardware(hardware), Precision(weights, "fp8")
    short = step_time(QWEN, machine, precision, Batch.decode(sequences, context))
    long = step_time(QWEN, machine, precision, Batch.decode(sequences, context + more))
    assert short.total <= long.total
    # No step is faster than the ceiling allows.
    rate = sequences / short.total
    assert rate <= decode_ceiling(QWEN, machine, precision, sequences, context) * (1 + 1e-9)


@given(sequences=st.integers(1, 300))
def test_a_larger_batch_gives_more_tokens_but_each_user_fewer(sequences: int) -> None:
    precision = Precision("nvfp4", "fp8")
    one = decode_ceiling(QWEN, SPARK, precision, sequences, 100)
    two = decode_ceiling(QWEN, SPARK, precision, sequences + 1, 100)
    assert two > one
    assert two / (sequences + 1) < one / sequences


def test_a_larger_memory_holds_more_tokens() -> None:
    precision = Precision("nvfp4", "fp8")
    larger = dataclasses.replace(SPARK, memory=2 * SPARK.memory)
    assert kv_capacity(QWEN, larger, precision) > 2 * kv_capacity(QWEN, SPARK, precision)
    assert kv_capacity(load_model("qwen3-32b"), load_hardware("l4"), Precision("bf16")) < 0


def test_a_publishers_name_and_a_path_find_the_model(tmp_path) -> None:
    for name in ("nvidia/Qwen3-8B-NVFP4", "Qwen/Qwen3-8B", "Qwen3-8B-FP8", "qwen3-8b"):
        assert load_model(name) == QWEN
    config = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2,
              "intermediate_size": 128, "vocab_size": 1000}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_model(str(tmp_path))
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (4, 16, False)
    assert load_model(str(tmp_path / "config.json")) == shape


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_experts": 8}, "mixture of experts"), ({"vocab_size": None}, "not a number"),
     ({"hidden_size": "x"}, "not a number")],
)  # fmt: skip
def test_a_config_of_something_else_is_refused(change: dict[str, object], said: str) -> None:
    config = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2,
              "intermediate_size": 128, "vocab_size": 1000}  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        ModelShape.from_config(config | change, "x")
    with pytest.raises(ConfigError, match="'vocab_size' is missing"):
        ModelShape.from_config({k: v for k, v in config.items() if k != "vocab_size"}, "x")


def test_unknown_names_are_answered_with_the_known_ones(tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"'dgx-sprak' is not known: use one of a100, .*dgx-spark"
    ):
        load_hardware("dgx-sprak")
    with pytest.raises(ConfigError, match=r"'qwen9' is not known: use one of .*qwen3-8b"):
        load_model("qwen9")
    with pytest.raises(ConfigError, match="weights 'fp3': use one of bf16, fp8, nvfp4, int4"):
        Precision(weights="fp3")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1]", "must be a mapping"), ("title: x", "is missing"), ("a: [", "not valid YAML"),
     ("{}", "is missing")],
)  # fmt: skip
def test_a_bad_hardware_file_is_one_sentence(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_hardware(str(path))


def test_a_hardware_file_of_ones_own(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    text = (
        "title: Mine\nmemory: 1.0e+10\nbandwidth: 1.0e+11\nflops: {bf16: 1.0e+12}\n"
        "bandwidth_efficiency: 0.5\ncompute_efficiency: 0.5\noverhead: 0\n"
        "memory_utilization: 0.9\nsource: me\n"
    )
    path.write_text(text)
    mine = load_hardware(str(path))
    assert (mine.name, mine.title, mine.peak("nvfp4")) == ("mine", "Mine", 1e12)
    path.write_text(text.replace("bandwidth: 1.0e+11", "bandwidth: fast"))
    with pytest.raises(ConfigError, match="'bandwidth' must be a positive number, not 'fast'"):
        load_hardware(str(path))
    path.write_text(text + "colour: red\n")
    with pytest.raises(ConfigError, match="'colour' is not known"):
        load_hardware(str(path))
