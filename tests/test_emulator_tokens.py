"""The emulator's tokenizer and made-up model: exact, reproducible, and apart by prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.emulator.api import ApiError, ChatRequest, CompletionRequest, Model, Order
from pytest_llmserve.emulator.tokens import Generator, Tokenizer

QWEN = Tokenizer(151_936)


@pytest.mark.parametrize("vocab", [100, 32_000, 128_256, 151_936, 262_144])
def test_every_token_of_every_vocabulary_comes_back(vocab: int) -> None:
    tokenizer = Tokenizer(vocab)
    ids = [*range(0, tokenizer.ordinary, max(1, tokenizer.ordinary // 5000)), vocab - 1, vocab - 6]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(st.lists(st.integers(0, 151_935).filter(lambda i: i < QWEN.ordinary), max_size=50))
def test_decoding_and_encoding_are_inverse(ids: list[int]) -> None:
    text = QWEN.decode(ids)
    assert QWEN.encode(text) == ids
    assert text.isascii()
    assert text.isprintable()


@given(st.text())
def test_any_text_has_tokens_of_the_vocabulary(text: str) -> None:
    ids = QWEN.encode(text)
    assert all(0 <= token < QWEN.vocab for token in ids)
    assert (ids == []) == (text == "")
    assert ids == QWEN.encode(text)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.integers(0, 3))
def test_the_answer_depends_on_prompt_and_seed_alone(prompt: list[int], seed: int) -> None:
    answer = [Generator(prompt, seed, 1000).token(i) for i in range(20)]
    assert answer == [Generator(prompt, seed, 1000).token(i) for i in range(20)]
    assert answer != [Generator([*prompt, 1], seed, 1000).token(i) for i in range(20)]
    assert answer != [Generator(prompt, seed + 1, 1000).token(i) for i in range(20)]
    assert 16 <= Generator(prompt, seed, 1000).natural_length() <= 512


def test_a_turn_of_a_chat_begins_with_the_turns_before() -> None:
    first = [{"role": "user", "content": "good day"}]
    opened = QWEN.chat(first)
    second = QWEN.chat([*first, {"role": "assistant", "content": " bacad"}])
    assert second[: len(opened)] == opened
    parts = [{"role": "user", "content": [{"type": "text", "text": "good day"}]}]
    assert QWEN.chat(parts) == opened


MODEL = Model(("m",), QWEN, max_model_len=1000, seed=0)


def written(order: Order) -> str:
    return "".join(order.text(i) for i in range(order.length))


def test_the_length_is_what_was_asked_for_or_what_comes_naturally() -> None:
    exact = MODEL.order(CompletionRequest(prompt="a", max_tokens=700, ignore_eos=True))
    assert (exact.length, exact.finish) == (700, "length")
    natural = MODEL.order(CompletionRequest(prompt="a", max_tokens=700))
    assert (natural.length <= 512, natural.finish) == (True, "stop")
    longer = MODEL.order(CompletionRequest(prompt="a", max_tokens=700, min_tokens=600))
    assert longer.length == 600
    assert MODEL.order(CompletionRequest(prompt="a")).length == 16
    chat = MODEL.order(ChatRequest(messages=[{"role": "user", "content": "a"}], ignore_eos=True))
    assert chat.length == 1000 - len(chat.prompt)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 50), st.integers(0, 40))
def test_a_stop_string_ends_the_text_before_it(
    start: int, size: int, more: int, least: int
) -> None:
    asked = CompletionRequest(prompt="a", max_tokens=60 + more, ignore_eos=True)
    whole = written(MODEL.order(asked))
    stop = whole[start : start + size]
    asked.stop, asked.min_tokens = [stop, "§"], min(least, 60)
    order = MODEL.order(asked)
    place = whole.find(stop, 6 * asked.min_tokens)
    assert written(order) == (whole if place < 0 else whole[:place])
    assert order.finish == ("length" if place < 0 else "stop")
    if place >= 0:
        assert 6 * (order.length - 1) < place + size <= 6 * order.length


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (CompletionRequest(prompt="a", model="other"), 404, "`other` does not exist"),
        (CompletionRequest(prompt=""), 400, "must not be empty"),
        (CompletionRequest(), 400, "must be a string or a list of token ids"),
        (CompletionRequest(prompt=["a", "b"]), 400, "one prompt a request"),
        (CompletionRequest(prompt=[1, 151_936]), 400, "Token id 151936 is out of vocabulary"),
        (CompletionRequest(prompt=[-1]), 400, "Token id -1 is out of vocabulary"),
        (CompletionRequest(prompt=[1] * 990, max_tokens=11), 400, "length is 1000 tokens"),
        (CompletionRequest(prompt=[1] * 1000), 400, "length is 1000 tokens"),
        (CompletionRequest(prompt="a", max_tokens=0, max_completion_tokens=0), 400, "at least 1"),
        (CompletionRequest(prompt="a", max_tokens=4, min_tokens=5), 400, "min_tokens must be"),
        (CompletionRequest(prompt="a", n=2), 400, "n must be 1"),
        (ChatRequest(), 400, "messages must not be empty"),
    ],
)
def test_what_vllm_would_refuse_is_refused(
    request_: CompletionRequest | ChatRequest, status: int, said: str
) -> None:
    with pytest.raises(ApiError, match=said) as error:
        MODEL.order(request_)
    assert error.value.status == status


def test_prompts_come_as_text_or_tokens_alone_or_in_a_list_of_one() -> None:
    ids = QWEN.encode("good day")
    for prompt in ("good day", ids, ["good day"], [ids]):
        assert MODEL.order(CompletionRequest(prompt=prompt)).prompt == ids
