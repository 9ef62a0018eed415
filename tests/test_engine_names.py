"""Names of engines and models as people write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve import engines
from pytest_llmserve.engines import engine_name, get_engine, normalise_model
from pytest_llmserve.errors import ConfigError

NOTICE = "There is no Qwen3 7B; taken as Qwen3-8B."


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("vllm", "vllm"),
        ("vLLM", "vllm"),
        ("trtllm", "tensorrt-llm"),
        ("TensorRT-LLM", "tensorrt-llm"),
        ("tensorrt_llm", "tensorrt-llm"),
        ("llama-cpp", "llama.cpp"),
        ("llama.cpp", "llama.cpp"),
        ("SGLang", "sglang"),
        ("emulated", "emulator"),
    ],
)
def test_spellings_of_engines(written, name):
    assert engine_name(written) == name
    assert get_engine(written).name == name


def test_unknown_engine_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        get_engine("vlmm")
    assert str(error.value) == (
        "There is no engine 'vlmm'; did you mean 'vllm'? Known engines: vllm, tensorrt-llm, "
        "sglang, llama.cpp, ollama, dynamo, emulator, attach."
    )
    with pytest.raises(ConfigError, match=r"There is no engine 'xyz'\. Known"):
        get_engine("xyz")


def test_engines_are_imported_when_asked_for():
    code = (
        "import sys; import pytest_llmserve.engines as e; e.engine_name('vllm');"
        "print([m for m in sys.modules if m.startswith('pytest_llmserve.engines.')])"
    )
    root = str(Path(engines.__file__).parents[2])
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert told.stdout.strip() == "['pytest_llmserve.engines.models']"


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package that registers engines, as a wheel would leave it on disk."""
    (tmp_path / "other_engines.py").write_text(
        "from dataclasses import replace\n"
        "from pytest_llmserve.engines import get_engine\n"
        "ENGINE = replace(get_engine('vllm'), name='my-engine')\n"
        "NOT_ONE = 5\n"
    )
    folder = tmp_path / "other_engines-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engines\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[pytest_llmserve.engines]\n"
        "my-engine = other_engines:ENGINE\n"
        "broken = no_such_module:ENGINE\n"
        "wrong = other_engines:NOT_ONE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_engines_of_third_parties(third_party):
    assert get_engine("My_Engine").name == "my-engine"
    with pytest.raises(ConfigError, match="'broken' of entry point 'no_such_module:ENGINE' cannot"):
        get_engine("broken")
    with pytest.raises(ConfigError, match="gives a int; it must name an instance of"):
        get_engine("wrong")
    with pytest.raises(ConfigError, match="did you mean 'my-engine'"):
        get_engine("my-engin")


@pytest.mark.parametrize(
    ("written", "name", "notice"),
    [
        ("Qwen3 7B", "Qwen3-8B", NOTICE),
        ("qwen3-7b", "Qwen3-8B", NOTICE),
        ("Qwen3_7B", "Qwen3-8B", NOTICE),
        ("qwen 3 7b", "Qwen3-8B", NOTICE),
        ("qwen3-8b", "Qwen3-8B", None),
        ("Qwen3 8B", "Qwen3-8B", None),
        ("Qwen/Qwen3-7B", "Qwen/Qwen3-8B", NOTICE),
        (
            "nvidia/Qwen3-7B-NVFP4",
            "nvidia/Qwen3-8B-NVFP4",
            "There is no Qwen3 7B; taken as Qwen3-8B-NVFP4.",
        ),
        ("nvidia/Qwen3-8B-NVFP4", "nvidia/Qwen3-8B-NVFP4", None),
        ("Qwen3 0.6b", "Qwen3-0.6B", None),
        ("Qwen3-13B", "Qwen3-14B", "There is no Qwen3 13B; taken as Qwen3-14B."),
        ("Qwen3-30B-A3B", "Qwen3-30B-A3B", None),
        ("Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B", None),
        ("Qwen2.5-7B", "Qwen2.5-7B", None),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", None),
        ("/models/qwen3-7b", "/models/qwen3-7b", None),
        ("./qwen3-7b", "./qwen3-7b", None),
        ("", "", None),
    ],
)
def test_models(written, name, notice):
    assert normalise_model(written) == (name, notice)


@given(st.text(max_size=30) | st.from_regex(r"(org/)?[qQ]wen3[-_ ]\d{1,3}(\.\d)?[bB](-FP8)?"))
def test_a_normal_name_stays_as_it_is(written):
    name, _ = normalise_model(written)
    assert normalise_model(name) == (name, None)
