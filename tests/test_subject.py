"""What a server computes on, in which precision: known exactly, or not at all and with a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_records import make_record

from pytest_llmserve.emulator.catalog import hardware_names, load_model
from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop
from pytest_llmserve.metrics.arithmetic import roofline
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.metrics.roofline import Precision
from pytest_llmserve.metrics.subject import (
    CHIPS,
    mean_context,
    precision_of,
    run_roofline,
    subject_of,
)
from pytest_llmserve.servers import Emulation, Server, ServerConfig
from pytest_llmserve.verdict.fingerprint import server_arguments

H200 = {"gpu": "NVIDIA H200"}
#: As vLLM's /server_info tells it of a model that is not quantized.
PLAIN = {"dtype": "torch.bfloat16", "quantization": None, "kv_cache_dtype": "auto"}


def subject(machine=H200, endpoint="http://127.0.0.1:8000", effective=PLAIN, **config):
    settings = {"name": "s", "engine": "vllm", "model": "Qwen/Qwen3-8B", **config}
    engine = settings["engine"] if settings["engine"] != "attach" else "vllm"
    server = Server(ServerConfig(**settings), endpoint, "m", engine, effective=effective)
    return subject_of(server, machine, server_arguments(server))


def test_every_chip_has_a_description():
    assert set(CHIPS.values()) == set(hardware_names()) - {"cpu"}


def test_vllm_on_an_h200():
    found = subject()
    assert found.hardware.name == "h200"
    assert found.shape.name == "qwen3-8b"
    assert found.precision == Precision("bf16", "bf16")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"gpus": 0}, "the server computes on the CPU"),
        ({"effective": {**PLAIN, "device": "cpu"}}, "the server computes on the CPU"),
        ({"machine": {}}, "no GPU of this machine can be asked"),
        ({"machine": {"gpu": "NVIDIA H100 PCIe"}}, "no description of NVIDIA H100 PCIe"),
        ({"machine": {"gpu": "NVIDIA H200 + NVIDIA L4"}}, "no description of NVIDIA H200 + NVIDIA"),
        ({"endpoint": "http://10.0.0.1"}, "name it by `hardware`"),
        ({"endpoint": "http://10.0.0.1", "hardware": "no-such"}, "'no-such' is not known"),
        ({"model": "acme/unheard-of"}, "'acme/unheard-of' is not known"),
        ({"args": {"data-parallel-size": 2}}, "data parallel"),
        ({"endpoint": "http://10.0.0.1", "hardware": "cpu", "args": {"tp": 2}}, "no link between"),
        ({"effective": {**PLAIN, "dtype": "torch.float32"}}, "the precision of the weights"),
        ({"effective": {**PLAIN, "quantization": "compressed-tensors"}}, "compressed-tensors"),
        ({"effective": {**PLAIN, "kv_cache_dtype": "turboquant_4bit_nc"}}, "turboquant_4bit_nc"),
        ({"engine": "llama.cpp", "effective": {}}, "the precision of the weights is not known"),
    ],
)
def test_what_is_not_known_is_said(case, said):
    found = subject(**case)
    assert isinstance(found, str)
    assert said in found
    assert "\n" not in found


def test_a_server_elsewhere_is_on_the_hardware_its_config_names():
    assert subject({}, "http://10.0.0.1", hardware="dgx-spark").hardware.name == "dgx-spark"


def test_tensor_parallel_gpus_are_one_machine():
    assert subject(args={"tensor-parallel-size": 4}).hardware.bandwidth == 4 * 4800e9
    assert subject(engine="sglang", effective={"tp_size": 2}).hardware.devices == 2


@pytest.mark.parametrize(
    ("engine", "model", "arguments", "expected"),
    [
        ("vllm", "m", {"dtype": "bfloat16"}, ("bf16", "bf16")),
        ("vllm", "m", {"dtype": "torch.float16", "kv-cache-dtype": "fp8_e4m3"}, ("bf16", "fp8")),
        ("vllm", "m", {"quantization": "fp8", "kv-cache-dtype": "auto"}, ("fp8", "bf16")),
        ("vllm", "m", {"quantization": "modelopt_fp4", "kv-cache-dtype": "fp8"}, ("nvfp4", "fp8")),
        ("vllm", "m", {"quantization": "awq_marlin"}, ("int4", "bf16")),
        ("vllm", "x/Qwen3-8B-FP8", {"quantization": "compressed-tensors"}, ("fp8", "bf16")),
        ("vllm", "x/Qwen3-8B.w4a16", {"quantization": "compressed-tensors"}, ("int4", "bf16")),
        ("vllm", "nvidia/Qwen3-8B-NVFP4", {}, ("nvfp4", "bf16")),
        ("vllm", "m", {"quantization": "not quantized", "dtype": "auto"}, ("bf16", "bf16")),
        ("tensorrt-llm", "x-NVFP4", {"config.kv-cache-config.dtype": "fp8"}, ("nvfp4", "fp8")),
        ("vllm", "m", {"kv-cache-dtype": "nvfp4"}, ("bf16", "nvfp4")),
    ],
)  # fmt: skip
def test_precisions(engine, model, arguments, expected):
    assert precision_of(engine, model, arguments) == Precision(*expected)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes"}, None),
        ({"quant_method": "gptq", "bits": 8}, None),
    ],
)
def test_a_local_folder_tells_its_quantization(tmp_path, quantization, expected):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    found = precision_of("vllm", str(tmp_path), {"quantization": quantization["quant_method"]})
    if expected is None:
        assert isinstance(found, str)
    else:
        assert found == Precision(expected, "bf16")


def test_an_engine_that_says_so_is_believed_over_a_name():
    found = subject(model="Qwen/Qwen3-8B-FP8")  # its weights were made up in BF16
    assert found.precision.weights == "bf16"


def test_an_emulated_server_is_what_it_imitates():
    meant = Emulation(hardware="l4", model="qwen3-4b", weights="fp8", kv="bf16")
    told = {"hardware": "h100", "model": "qwen3-8b", "weights": "int4", "kv_cache_dtype": "fp8"}
    launched = Server(
        ServerConfig("s", "vllm", emulation=meant), "http://x", "m", "emulator", emulated=True
    )
    found = subject_of(launched, H200, {})
    assert (found.hardware.name, found.shape.name) == ("l4", "qwen3-4b")
    assert found.precision == Precision("fp8", "bf16")
    attached = Server(
        ServerConfig("s", "attach"), "http://x", "m", "emulator", effective=told, emulated=True
    )
    found = subject_of(attached, H200, {})
    assert (found.hardware.name, found.shape.name) == ("h100", "qwen3-8b")
    assert found.precision == Precision("int4", "fp8")


PLAN = LoadPlan(closed_loop(2, ramp=0.0), Workload(10, 3), duration=10.0)


def load(prompt=100, output=3, slow=1.0):
    """Two users back to back, one answer each `slow` seconds."""
    rows = [
        {
            "intended": t * slow,
            "user": user,
            "events": [(t + (i + 1) / output) * slow for i in range(output)],
            "prompt_tokens": prompt,
            "want_output": output,
        }
        for user in range(2)
        for t in range(11)
    ]
    record = make_record(rows)
    return record, measure(record, PLAN) | {"server": {"waiting": {"mean": None}}}


def test_context_is_prompt_and_half_of_the_output():
    assert mean_context(*load(prompt=100, output=4)) == pytest.approx(102.0)


def test_the_figure_of_a_run_is_that_of_the_arithmetic():
    record, metrics = load()
    found = run_roofline(subject(), record, metrics, {})
    expected = roofline(
        load_model("qwen3-8b"), subject().hardware, Precision("bf16", "bf16"),
        rate=metrics["output_throughput"], sequences=metrics["concurrency"]["mean"], context=101.5,
    )  # fmt: skip
    assert found["share"] == pytest.approx(expected.share)
    assert found["lines"] == [str(line) for line in expected.lines]
    assert found["share"] * found["ceiling"] == pytest.approx(metrics["output_throughput"])
    json.dumps(found, allow_nan=False)


def test_requests_that_wait_are_not_in_the_batch():
    record, metrics = load()
    waiting = metrics | {"server": {"waiting": {"mean": 1.0}}}
    alone = run_roofline(subject(), record, waiting, {})
    assert alone["share"] > run_roofline(subject(), record, metrics, {})["share"]
    all_wait = metrics | {"server": {"waiting": {"mean": 5.0}}}
    assert run_roofline(subject(), record, all_wait, {})["share"] == pytest.approx(alone["share"])


def test_speculation_is_credited():
    record, metrics = load()
    spec = {"spec_drafts": 10.0, "spec_draft_tokens": 30.0, "spec_accepted_tokens": 20.0}
    found = run_roofline(subject(), record, metrics, spec)
    plain = run_roofline(subject(), record, metrics, {})
    assert found["ceiling"] == pytest.approx(3 * plain["ceiling"], rel=0.01)
    untold = {"spec_draft_tokens": 30.0, "spec_accepted_tokens": 20.0}
    assert "how many drafts" in run_roofline(subject(), record, metrics, untold)["reason"]


def test_without_output_or_subject_there_is_a_reason():
    record, metrics = load()
    assert run_roofline("unknown", record, metrics, {}) == {"reason": "unknown"}
    empty = metrics | {"output_throughput": None}
    assert "no output" in run_roofline(subject(), record, empty, {})["reason"]


WORDS = st.sampled_from(
    [
        "",
        "auto",
        "fp8",
        "awq",
        "gptq",
        "modelopt",
        "torch.bfloat16",
        "float32",
        "nvfp4",
        "Qwen3-FP8",
    ]
) | st.text(max_size=20)


@given(WORDS, WORDS, WORDS, WORDS, st.sampled_from(["vllm", "llama.cpp", "attach"]))
def test_whatever_an_engine_says_there_is_a_precision_or_a_reason(
    quantization, kv, dtype, model, engine
):
    said = {"quantization": quantization, "kv-cache-dtype": kv, "dtype": dtype}
    found = precision_of(engine, model, said)
    assert isinstance(found, (Precision, str))
