from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from random import Random

import pytest
from bpe import BPE
from emulated import emulated
from hypothesis import given
from hypothesis import strategies as st
from wire_server import WireServer

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.ask import ask_json
from pytest_llmserve.load.plan import Lengths, LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.requests import Requests
from pytest_llmserve.load.tokens import (
    LEAST_IDS,
    WORDS,
    Prompts,
    Texts,
    prepare,
    token_pool,
)


def reply(payload, status="200 OK"):
    body = json.dumps(payload).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@cache
def tokenizer(merges):
    return BPE(merges)


def tokenizing(encode=str.split, overhead=0):
    """A server that counts tokens of texts and chats, with `overhead` around each prompt."""

    def answer(conn, request):
        head, body = request
        if "messages" not in body:
            tokens = encode(body["prompt"])
        elif hasattr(encode, "__self__"):
            tokens = encode.__self__.chat(body["messages"])
        else:
            tokens = [word for one in body["messages"] for word in encode(one["content"])]
        count = len(tokens) + overhead
        if b"/tokenize" in head:
            ids = [1000 + WORDS.index(token) if token in WORDS else 999 for token in tokens]
            return reply({"count": count, "tokens": ids})
        return reply({"usage": {"prompt_tokens": count, "completion_tokens": 1}})

    return answer


def without_tokenize(answer):
    def other(conn, request):
        if b"/tokenize" in request[0]:
            return reply({"detail": "Not Found"}, "404 Not Found")
        return answer(conn, request)

    return other


def test_a_pool_of_ids_from_ordinary_text():
    with WireServer(tokenizing()) as server:
        pool = token_pool(server.url, {"Authorization": "Bearer x"}, "m")
        assert b"Authorization: Bearer x" in server.requests[0][1]
        assert server.requests[0][2]["add_special_tokens"] is False
    assert len(pool) == len(set(pool)) == len(set(WORDS)) >= LEAST_IDS
    assert min(pool) >= 1000


@pytest.mark.parametrize(
    "answer",
    [
        without_tokenize(tokenizing()),
        lambda conn, request: reply({"tokens": [1, 2, 3]}),
        lambda conn, request: reply({"tokens": ["a"] * 200}),
        lambda conn, request: reply([]),
        lambda conn, request: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        lambda conn, request: None,
    ],
)
def test_no_pool_where_there_is_no_such_endpoint(answer):
    with WireServer(answer) as server:
        assert token_pool(server.url, {}, "m") == ()


def test_ids_need_no_asking():
    target = Target("http://127.0.0.1:9", "m", token_ids=(1, 2, 3))
    assert prepare(target, Workload(10)) == Prompts(ids=(1, 2, 3))


def bodies(target, workload, prompts, requests=12):
    """Bodies and wanted prompt lengths of the first requests of a user, and of a warm-up."""
    maker = Requests(target, LoadPlan(closed_loop(1), workload, seed=5), prompts)
    made = [maker.make(0, -1, 0), *(maker.make(1, 0, number) for number in range(requests))]
    return [(json.loads(raw.partition(b"\r\n\r\n")[2]), want) for raw, want, _ in made]


WORKLOADS = [
    Workload(64, 8),
    Workload(64, 8, api="chat"),
    Workload(30, 5, turns=4, api="chat"),
    Workload(30, 25, turns=3),
    Workload(90, 5, shared_prefix=40, api="chat"),
    Workload(prompt_lengths=Lengths("uniform", 20, 300), api="chat"),
    Workload(900, 5),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("merges", [0, 60, 700])
@pytest.mark.parametrize("wrap", [lambda answer: answer, without_tokenize])
def test_text_has_exactly_the_tokens_asked_for(workload, merges, wrap):
    """Whether few words are one token (0 merges: one a byte), or most; asked either way."""
    bpe = tokenizer(merges)
    if merges == 0:  # the template is long then, and longer than a question in a conversation
        if workload.turns > 1 and workload.api == "chat":
            pytest.skip("the questions would have to be longer than the template between them")
        lengths = workload.prompt_lengths and Lengths("uniform", 100, 300)
        workload = replace(
            workload, prompt_tokens=workload.prompt_tokens + 60, prompt_lengths=lengths
        )
    with WireServer(wrap(tokenizing(bpe.encode))) as server:
        target = Target(server.url, "m")
        prompts = prepare(target, workload)
        assert len(server.requests) < 150
    made = bodies(target, workload, prompts)
    for body, want in made:
        got = bpe.chat(body["messages"]) if "messages" in body else bpe.encode(body["prompt"])
        assert len(got) == want
    texts = {json.dumps(body.get("messages", body.get("prompt"))) for body, _ in made}
    assert len(texts) == len(made)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_the_emulator_counts_the_tokens_asked_for(workload, emulator):
    target = Target(emulator, "emulated", body={"ignore_eos": True})
    for body, want in bodies(target, workload, prepare(target, workload), 4):
        path = "chat/completions" if "messages" in body else "completions"
        asked = {**body, "max_tokens": 1, "stream": False}
        asked.pop("stream_options")
        answer = ask_json(f"{emulator}/v1/{path}", {}, asked)
        assert answer["usage"]["prompt_tokens"] == want


@pytest.fixture(scope="module")
def emulator():
    flags = ("--load-time", "0", "--served-model-name", "emulated", "--schedule", "max-rate")
    with emulated(*flags) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_what_a_request_adds_beyond_tokenize_is_noticed():
    def answer(conn, request):
        more = 0 if b"/tokenize" in request[0] else 7
        return tokenizing(overhead=3 + more)(conn, request)

    with WireServer(answer) as server:
        assert prepare(Target(server.url, "m"), Workload(50)).overhead == 11


def test_a_prompt_shorter_than_the_template_is_refused():
    with (
        WireServer(tokenizing(overhead=30)) as server,
        pytest.raises(LoadError, match="one word are 31 tokens") as caught,
    ):
        prepare(Target(server.url, "m"), Workload(30, api="chat"))
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 200),
    st.integers(0, 9),
)
def test_drawn_texts_sum_to_what_is_asked_or_the_most_below(counts, tokens, seed):
    texts = Texts([f"{i}:{n}" for i, n in enumerate(counts)], counts)
    drawn = [int(text.partition(":")[2]) for text in texts.draw(tokens, Random(seed))]
    sums = {0}
    for _ in range(tokens):
        sums |= {a + b for a in sums for b in counts if a + b <= tokens}
        if tokens in sums:
            break
    assert sum(drawn) == max(sums)
    again = [int(text.partition(":")[2]) for text in texts.draw(tokens, Random(seed))]
    assert again == drawn


def test_a_way_through_json_keeps_prompts():
    for prompts in (Prompts(), Prompts(ids=(3, 4)), Prompts((), ("a", "b"), (1, 3), 9, 4)):
        assert Prompts.from_dict(json.loads(json.dumps(prompts.as_dict()))) == prompts


def test_a_server_that_says_nothing_gets_a_word_a_token():
    with WireServer(lambda conn, request: reply({})) as server:
        assert prepare(Target(server.url, "m"), Workload(10)) == Prompts()


def test_fields_of_the_engine_are_sent_verbatim():
    target = Target("http://h:1/base", "m", body={"note": '100 % "sure"', "stop": None})
    plan = LoadPlan(closed_loop(1), Workload(4, 7, stream=False))
    made, _, _ = Requests(target, plan, Prompts(ids=(5, 6))).make(1, 0, 0)
    head, _, raw = made.partition(b"\r\n\r\n")
    body = json.loads(raw)
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: h:1\r\n")
    assert f"Content-Length: {len(raw)}".encode() in head
    assert (body["note"], body["stop"], body["max_tokens"]) == ('100 % "sure"', None, 7)
    assert "stream_options" not in body
    assert len(body["prompt"]) == 4
