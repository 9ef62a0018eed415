"""How the emulator speaks as each engine: stream shapes and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from emulated import Emulated, emulated

from pytest_llmserve.emulator.dialects import DIALECTS
from pytest_llmserve.engines import get_engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUICK = ("--hardware", "h200", "--model", "qwen3-0.6b", "--overhead", "0")
TOKENS = 20
ASKED = {
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=sorted(DIALECTS))
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, Emulated]]:
    with emulated(*QUICK, "--dialect", request.param, "--reasoning-tokens", "3") as running:
        yield request.param, running


def deltas(chunks: list[Any]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def test_every_dialect_writes_the_same_answer(server: tuple[str, Emulated]) -> None:
    name, running = server
    whole = running.json(COMPLETIONS, {"prompt": "a", "max_tokens": TOKENS, "ignore_eos": True})
    chunks = running.chunks(COMPLETIONS, {"prompt": "a", **ASKED})
    text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    assert text == whole["choices"][0]["text"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert len(reasons) == TOKENS + (1 if DIALECTS[name].finish_apart else 0)
    empty = [c for c in chunks[: TOKENS - 1] if c["choices"][0]["text"] == ""]
    assert len(empty) == {"tensorrt-llm": 2}.get(name, 0)


def test_a_chat_has_the_engines_own_shape(server: tuple[str, Emulated]) -> None:
    name, running = server
    chunks = running.chunks(CHAT, {"messages": HELLO, **ASKED})
    first = deltas(chunks)[0]
    opening = {
        "vllm": {"role": "assistant", "content": ""},
        "sglang": {"role": "assistant", "content": ""},
        "tensorrt-llm": {"role": "assistant"},
        "llama.cpp": {"role": "assistant", "content": None},
    }
    if name == "ollama":  # every chunk repeats the role, and none comes before the first token
        assert all(delta["role"] == "assistant" for delta in deltas(chunks))
        assert first["reasoning"]
    else:
        assert first == opening[name]
    field = "reasoning" if name in ("vllm", "ollama") else "reasoning_content"
    assert len([d for d in deltas(chunks) if d.get(field)]) == 3
    whole = running.json(CHAT, {"messages": HELLO, "max_tokens": TOKENS, "ignore_eos": True})
    message = whole["choices"][0]["message"]
    said = "".join(d.get("content") or "" for d in deltas(chunks))
    thought = "".join(d.get(field) or "" for d in deltas(chunks))
    assert (thought, said) == (message[field], message["content"])


def test_lines_are_written_as_the_engine_writes_them(server: tuple[str, Emulated]) -> None:
    name, running = server
    lines = running.events(COMPLETIONS, {"prompt": "a", **ASKED})
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) == (1 if name == "llama.cpp" else 0)
    data = [line for line in lines if line.startswith("data: {")]
    assert all(line.endswith("} " if name == "tensorrt-llm" else "}") for line in data)
    nulls = [json.loads(line[5:]).get("usage", "absent") is None for line in data[:-1]]
    assert all(nulls) if name == "sglang" else not any(nulls)


def test_metrics_have_the_engines_names(server: tuple[str, Emulated]) -> None:
    name, running = server
    engine = get_engine(name)
    if name == "ollama":
        assert running.ask("/metrics")[0] == 404
        assert running.json("/api/version")["emulated"]
        return
    running.json(COMPLETIONS, {"prompt": [1] * 30, "max_tokens": 4, "ignore_eos": True})
    now = running.metrics(engine.metrics)
    assert now["llmserve_emulated"] == 1
    assert now[engine.counters["generation_tokens"][0]] >= 4
    assert now[engine.counters["prompt_tokens"][0]] >= 30
    if "ttft" in engine.counters:
        assert now[engine.counters["ttft"][0] + "_count"] >= 1


def test_every_dialect_has_the_emulators_own_account(server: tuple[str, Emulated]) -> None:
    """Or the emulated engine, which is one engine whatever it imitates, could not read it."""
    _, running = server
    running.json(COMPLETIONS, {"prompt": [1] * 30, "max_tokens": 4, "ignore_eos": True})
    own = get_engine("emulator")
    assert running.metrics(own.metrics)[own.counters["generation_tokens"][0]] >= 4


def test_llama_cpp_listens_while_it_loads_and_the_others_refuse() -> None:
    with emulated("--dialect", "llama.cpp", "--load-time", "20", wait_for="Listening") as loading:
        assert loading.ask("/health")[0] == 503
        status, _, data = loading.ask(COMPLETIONS, {"prompt": "a"})
        assert (status, json.loads(data)["error"]["code"]) == (503, 503)
    with emulated("--load-time", "20", wait_for="Loading weights") as loading:
        assert loading.port == 0, "nothing listens yet"
        assert not any("Listening" in line for line in loading.log)
