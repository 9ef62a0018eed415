"""From a config to an engine's command line: arguments verbatim, value types right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.engines import FILES, MODULES, SERVER_METRICS, Engine, get_engine
from pytest_llmserve.engines.options import option_words
from pytest_llmserve.servers import ContainerRunner, ProcessRunner, ServerConfig

NAMES = st.from_regex(r"[a-z][a-z-]{0,12}[a-z]", fullmatch=True)


def config(engine, **changes):
    settings = {"name": "x", "engine": engine, "model": "org/model"}
    return ServerConfig(**settings | changes)


def words(engine, **changes):
    return get_engine(engine).command(config(engine, **changes), 8123)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"max-num-seqs": 64}, ["--max-num-seqs", "64"]),
        ({"max_num_seqs": 64}, ["--max_num_seqs", "64"]),
        ({"-np": 4}, ["-np", "4"]),
        ({"gpu-memory-utilization": 0.85}, ["--gpu-memory-utilization", "0.85"]),
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"quantization": None}, []),
        ({"model": "5"}, ["--model", "5"]),
        (
            {"speculative-config": {"method": "ngram", "num_speculative_tokens": 3}},
            ["--speculative-config", '{"method":"ngram","num_speculative_tokens":3}'],
        ),
        ({"cudagraph-capture-sizes": [1, 2, 4]}, ["--cudagraph-capture-sizes", "1", "2", "4"]),
        ({"allowed-origins": ["*"]}, ["--allowed-origins", '["*"]']),
        ({"middleware": ["a.b", "c.d"]}, ["--middleware", "a.b", "--middleware", "c.d"]),
        ({"lora-modules": [{"name": "a"}]}, ["--lora-modules", '{"name":"a"}']),
    ],
)
def test_values_of_vllm(args, expected):
    assert words("vllm", args=args) == [
        "serve",
        "org/model",
        "--host",
        "127.0.0.1",
        "--port",
        "8123",
        *expected,
    ]


@given(st.dictionaries(NAMES, st.integers() | st.floats(allow_nan=False) | st.booleans()))
def test_numbers_survive_the_command_line(args):
    line = option_words(args)
    for name, value in args.items():
        if value is True:
            assert f"--{name}" in line
        elif value is False:
            assert f"--no-{name}" in line
        else:
            told = line[line.index(f"--{name}") + 1]
            assert json.loads(told) == value
            assert type(json.loads(told)) is type(value)


def test_vllm_as_a_module_takes_the_model_as_an_option():
    line = words("vllm", runner=ProcessRunner(interpreter="/x/python"))
    assert line[:2] == ["--model", "org/model"]
    assert words("vllm", runner=ContainerRunner(image="i"))[:2] == ["serve", "org/model"]


def test_served_name_is_given_once():
    assert words("vllm", served_model_name="short")[-2:] == ["--served-model-name", "short"]
    line = words("vllm", served_model_name="short", args={"served_model_name": "other"})
    assert "short" not in line


def test_development_endpoints_only_on_loopback():
    environment = get_engine("vllm").environment
    assert environment(config("vllm"))["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in environment(config("vllm", host="0.0.0.0"))


def test_bare_names_of_qwen_are_found_on_the_hub():
    assert words("vllm", model="Qwen3-8B")[1] == "Qwen/Qwen3-8B"
    assert words("vllm", model="/models/Qwen3-8B")[1] == "/models/Qwen3-8B"
    assert words("vllm", model="nvidia/Qwen3-8B-NVFP4")[1] == "nvidia/Qwen3-8B-NVFP4"


def test_sglang():
    assert words("sglang", args={"tp": 2, "disable-radix-cache": False}) == [
        *("serve", "--model-path", "org/model", "--host", "127.0.0.1", "--port", "8123"),
        *("--enable-metrics", "--tp", "2"),
    ]
    line = words("sglang", runner=ProcessRunner(interpreter="python"))
    assert line[0] == "--model-path"


def test_llama_cpp():
    assert words("llama.cpp", model="/m/a.gguf", args={"-np": 30, "-c": 4096}) == [
        *("-m", "/m/a.gguf", "--host", "127.0.0.1", "--port", "8123"),
        *("--metrics", "-np", "30", "-c", "4096"),
    ]
    assert words("llama.cpp")[:2] == ["-hf", "org/model"]


def test_ollama_gets_its_address_by_the_environment():
    assert words("ollama") == ["serve"]
    assert get_engine("ollama").environment(config("ollama"))["OLLAMA_HOST"] == "127.0.0.1:{port}"


def test_keys_go_by_the_environment():
    keys = {name: get_engine(name).api_key for name in MODULES if get_engine(name).api_key}
    assert keys == {
        "vllm": "VLLM_API_KEY",
        "llama.cpp": "LLAMA_API_KEY",
        "emulator": "LLMSERVE_EMULATOR_API_KEY",
    }
    assert words("emulator")[-2:] == ["--api-key-env", keys["emulator"]]


@pytest.mark.parametrize("name", MODULES)
def test_every_engine_is_whole(name):
    engine = get_engine(name)
    assert isinstance(engine, Engine)
    assert engine.name == name
    assert set(engine.counters) <= set(SERVER_METRICS)
    made = replace(config(name), endpoint="http://x:1")
    line = engine.command(made, 8123)
    assert all(isinstance(word, str) for word in line)
    assert all(isinstance(value, str) for value in engine.environment(made).values())
    needed = any(FILES in word for word in line)
    assert needed == bool(engine.files(made)), "files are written if and only if they are read"
    for failure in engine.failures:
        assert "{what}" not in failure.cause or "(?P<what>" in failure.pattern
        assert not failure.mend.endswith("."), "it is put into a sentence"


@pytest.mark.parametrize("name", [n for n in MODULES if n != "emulator"])
def test_a_server_that_tells_nothing_has_no_version(name):
    engine = get_engine(name)
    assert engine.version(lambda path: None) == ""
    assert engine.effective(lambda path: None) == {}
