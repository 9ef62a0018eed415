from __future__ import annotations

import json

import pytest
from wire_server import WireServer

from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.requests import Requests
from pytest_llmserve.load.tokens import LEAST_IDS, WORDS, Prompts, prepare, token_pool


def reply(payload, status="200 OK"):
    body = json.dumps(payload).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def tokenizing(overhead=0, per_word=1.0):
    """A server whose tokens are words, and a template's `overhead` around a chat."""

    def answer(conn, request):
        head, body = request
        words = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        count = round(len(words.split()) * per_word) + overhead
        if b"/tokenize" in head:
            tokens = [1000 + WORDS.index(word) for word in words.split()]
            return reply({"count": count, "tokens": tokens})
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


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("wrap", [lambda answer: answer, without_tokenize])
def test_text_gets_the_length_the_server_counts(api, wrap):
    workload = Workload(100, 5, api=api)
    with WireServer(wrap(tokenizing(overhead=13))) as server:
        target = Target(server.url, "m", token_ids=(1, 2, 3) if api == "chat" else ())
        prompts = prepare(target, workload)
    assert prompts.ids == ()
    assert prompts.words(100) == 87
    made, want, _ = Requests(target, LoadPlan(closed_loop(1), workload), prompts).make(1, 0, 0)
    body = json.loads(made.partition(b"\r\n\r\n")[2])
    text = body["messages"][0]["content"] if api == "chat" else body["prompt"]
    assert (len(text.split()), want) == (87, 100)


def test_words_of_several_tokens_are_allowed_for():
    with WireServer(tokenizing(per_word=1.5)) as server:
        prompts = prepare(Target(server.url, "m"), Workload(300, 5))
    assert abs(prompts.words(300) - 200) <= 1


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
