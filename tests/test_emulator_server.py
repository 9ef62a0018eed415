"""The emulated server over HTTP, in a process of its own, as clients meet it."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator

import pytest
from emulated import Emulated, emulated

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
QUICK = ("--hardware", "h200", "--model", "qwen3-0.6b", "--overhead", "0")


@pytest.fixture(scope="module")
def server() -> Iterator[Emulated]:
    with emulated(
        *QUICK, "--served-model-name", "tiny", "--enable-prompt-tokens-details"
    ) as running:
        yield running


def until(true, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return bool(true())


def test_it_says_that_it_is_emulated_everywhere(server: Emulated) -> None:
    status, headers, _ = server.ask("/health")
    assert status == 200
    assert headers["Server"] == "llmserve-emulator (emulated)"
    version = server.json("/version")
    assert (version["emulated"], version["engine"]) == (True, "emulator")
    (model,) = server.json("/v1/models")["data"]
    assert (model["id"], model["owned_by"]) == ("tiny", "pytest-llmserve-emulator")
    assert model["max_model_len"] == 40_960
    info = server.json("/server_info?config_format=json")
    assert info["emulated"]
    assert info["config"]["hardware"] == "h200"
    text = server.ask("/metrics")[2].decode()
    assert 'llmserve_emulated{model_name="tiny"} 1.0' in text
    helps = [line for line in text.splitlines() if line.startswith("# HELP")]
    assert all("emulated" in line for line in helps)
    assert "EMULATED" in server.log[0]


def test_a_completion_streams_one_token_an_event(server: Emulated) -> None:
    chunks = server.chunks(COMPLETIONS, {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5,
                                         "ignore_eos": True})  # fmt: skip
    assert len(chunks) == 5
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["length"]
    assert all(c["choices"][0]["text"] for c in chunks)
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert len({c["id"] for c in chunks}) == 1


def test_streamed_and_whole_answers_are_the_same_text(server: Emulated) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "once upon"}), (CHAT, {"messages": HELLO})):
        asked = {**body, "max_tokens": 40, "ignore_eos": True}
        whole = server.json(path, asked)
        chunks = server.chunks(path, asked)
        if path == CHAT:
            text = whole["choices"][0]["message"]["content"]
            parts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
        else:
            text = whole["choices"][0]["text"]
            parts = [c["choices"][0]["text"] for c in chunks]
        assert "".join(parts) == text
        assert whole["usage"]["completion_tokens"] == 40
        assert server.json("/tokenize", {"prompt": text})["count"] == 40
        again = server.json(path, asked)
        assert again["choices"] == whole["choices"]


def test_usage_comes_as_vllm_sends_it(server: Emulated) -> None:
    body = {"prompt": [5] * 40, "max_tokens": 3, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.chunks(COMPLETIONS, {**body, "stream_options": options})
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 40
    last = server.chunks(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})[-1]
    # The prompt was seen before: two of its blocks of 16 come from the prefix cache.
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
    assert all("usage" not in c for c in server.chunks(COMPLETIONS, body))


def test_a_chat_opens_with_the_role(server: Emulated) -> None:
    chunks = server.chunks(CHAT, {"messages": HELLO, "max_tokens": 2, "ignore_eos": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["delta"]["content"] != "" for c in chunks] == [False, True, True]


def test_tokens_and_text_convert_both_ways(server: Emulated) -> None:
    text = server.json("/detokenize", {"tokens": [1, 2, 150_000]})["prompt"]
    answer = server.json("/tokenize", {"model": "tiny", "prompt": text})
    assert answer == {"count": 3, "max_model_len": 40_960, "tokens": [1, 2, 150_000]}
    chat = server.json("/tokenize", {"messages": HELLO})
    asked = server.json(CHAT, {"messages": HELLO, "max_tokens": 1})
    assert asked["usage"]["prompt_tokens"] == chat["count"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "The model `other` does not exist."),
        (COMPLETIONS, b"{", 400, "not valid JSON"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, 400, "$.max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 50_000}, 400, "context length is 40960"),
        (CHAT, {"messages": "hello"}, 400, "$.messages"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "Stream options"),
        ("/v1/nothing", None, 404, "Not Found"),
        ("/v1/completions", None, 405, "Method Not Allowed"),
        ("/detokenize", {"tokens": [1 << 40]}, 400, "tokens must be ids"),
        ("/tokenize", {}, 400, "prompt or messages"),
    ],
)
def test_errors_have_vllms_shape(
    server: Emulated, path: str, body: object, status: int, said: str
) -> None:
    got, _, data = server.ask(path, body)
    error = json.loads(data)["error"]
    assert (got, error["code"]) == (status, status)
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_not_http_is_refused_and_the_server_lives(server: Emulated) -> None:
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert raw.recv(1000) == b""
    assert server.ask("/ping")[0] == 200


def test_head_gets_the_headers_alone(server: Emulated) -> None:
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(b"HEAD /version HTTP/1.1\r\nconnection: close\r\n\r\n")
        data = b""
        while piece := raw.recv(65536):
            data += piece
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert data.endswith(b"\r\n\r\n")


def test_requests_on_one_connection_are_answered_in_turn(server: Emulated) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2, "ignore_eos": True}).encode()
    one = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    close = b"GET /version HTTP/1.1\r\nconnection: close\r\n\r\n"
    with socket.create_connection((server.host, server.port)) as raw:
        raw.sendall(one + one + close)
        data = b""
        while piece := raw.recv(65536):
            data += piece
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.count(b"completion_tokens") == 2
    assert data.rindex(b'"engine"') > data.rindex(b"completion_tokens")


def test_a_lost_client_frees_its_request_and_its_blocks() -> None:
    slow = ("--bandwidth-efficiency", "0.05", "--num-gpu-blocks-override", "100",
            "--max-model-len", "1600")  # fmt: skip
    with emulated(*slow) as server:
        body = {"prompt": [1] * 160, "max_tokens": 1400, "ignore_eos": True, "stream": True}
        raw = socket.create_connection((server.host, server.port))
        data = json.dumps(body).encode()
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data))
        raw.sendall(data)
        assert until(lambda: server.metrics()["vllm:num_requests_running"] == 1)
        assert server.metrics()["vllm:kv_cache_usage_perc"] > 0.09
        raw.close()
        assert until(lambda: server.metrics()["vllm:num_requests_running"] == 0)
        now = server.metrics()
        assert now["vllm:kv_cache_usage_perc"] == 0.0
        assert now["vllm:request_success_total"] == 1  # finished_reason="abort"


def test_counters_and_histograms_count_what_was_served() -> None:
    with emulated(*QUICK) as server:
        for _ in range(3):
            server.json(COMPLETIONS, {"prompt": [7] * 50, "max_tokens": 20, "ignore_eos": True})
        now = server.metrics()
        assert now["vllm:prompt_tokens_total"] == now["vllm:prefix_cache_queries_total"] == 150
        assert now["vllm:prefix_cache_hits_total"] == now["vllm:prompt_tokens_cached_total"] == 96
        assert now["vllm:generation_tokens_total"] == 60
        assert now["vllm:request_success_total"] == 3
        for name, count in (("time_to_first_token", 3), ("inter_token_latency", 57),
                            ("e2e_request_latency", 3), ("request_queue_time", 3)):  # fmt: skip
            assert now[f"vllm:{name}_seconds_count"] == count
        assert server.ask("/reset_prefix_cache", {})[0] == 200
        server.json(COMPLETIONS, {"prompt": [7] * 50, "max_tokens": 1})
        assert server.metrics()["vllm:prefix_cache_hits_total"] == 96


def test_speculation_sends_several_tokens_an_event() -> None:
    with emulated(*QUICK, "--num-speculative-tokens", "3", "--acceptance", "1") as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = server.chunks(COMPLETIONS, {"prompt": "a", "max_tokens": 10, "ignore_eos": True,
                                             "stream_options": options})  # fmt: skip
        assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 5, 9, 10, 10]
        now = server.metrics()
        assert now["vllm:spec_decode_num_drafts_total"] == 2
        assert now["vllm:spec_decode_num_accepted_tokens_total"] == 6


def test_it_asks_for_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_TEST_KEY", "secret")
    with emulated(*QUICK, "--api-key-env", "LLMSERVE_TEST_KEY") as server:
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/health")[0] == 200
        assert server.ask("/v1/models", authorization="Bearer secret")[0] == 200
        assert "secret" not in server.ask("/server_info")[2].decode()


def test_a_full_queue_answers_503() -> None:
    flags = ("--batching", "serial", "--max-num-queued-reqs", "1", "--bandwidth-efficiency", "0.05")
    with emulated(*flags) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        raws = [socket.create_connection((server.host, server.port)) for _ in range(2)]
        for raw in raws:
            raw.sendall(request)
        assert until(lambda: server.metrics()["vllm:num_requests_waiting"] == 1)
        status, _, data = server.ask(COMPLETIONS, {"prompt": "b"})
        assert status == 503
        assert b"overloaded" in data
        assert server.metrics()["vllm:admission_rejections_total"] == 1
        for raw in raws:
            raw.close()


def test_it_serves_on_ipv6() -> None:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with emulated(*QUICK, host="::1") as server:
        assert server.ask("/health")[0] == 200
        assert any("http://[::1]:" in line for line in server.log)


def test_sigterm_ends_it_at_once_in_the_middle_of_a_stream() -> None:
    with emulated("--bandwidth-efficiency", "0.05") as server:
        with socket.create_connection((server.host, server.port)) as raw:
            body = b'{"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true}'
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            assert raw.recv(20)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 0
        assert not any("Traceback" in line for line in server.log)


def test_a_taken_port_is_one_sentence(server: Emulated) -> None:
    with emulated("--port", str(server.port), wait_for="error") as second:
        assert "error: cannot listen on 127.0.0.1" in second.log[-1]
        assert "[Errno 98]" in second.log[-1]
        assert second.process.wait(5) == 1
