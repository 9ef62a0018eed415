from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pytest_llmserve.engines.vllm import ENGINE
from pytest_llmserve.metrics.server import Sampler, delta, parse, scrape
from pytest_llmserve.servers import Server, ServerConfig

NEW = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0"} 100.0
vllm:generation_tokens_created{engine="0"} 1.7e9
# TYPE vllm:request_success counter
vllm:request_success_total{finished_reason="stop"} 1.0
vllm:request_success_total{finished_reason="length"} 9.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1"} 5.0
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 10.0
vllm:time_to_first_token_seconds_sum 1.5
vllm:time_to_first_token_seconds_count 10.0
"""


def test_sums_over_engines_and_labels():
    assert parse(NEW, ENGINE.counters) == {
        "running": 7.0,
        "kv_usage": 0.5,
        "generation_tokens": 100.0,
        "requests": 10.0,
        "ttft.sum": 1.5,
        "ttft.count": 10.0,
    }


def test_older_names_are_known():
    assert parse("vllm:gpu_cache_usage_perc 0.5\n", ENGINE.counters) == {"kv_usage": 0.5}


def test_what_is_not_an_exposition_is_nothing():
    assert parse('[{"iter": 1}]', ENGINE.counters) == {}
    assert parse("", ENGINE.counters) == {}


def test_growth_of_counters_only():
    before = {"running": 1.0, "generation_tokens": 10.0, "requests": 5.0}
    after = {"running": 9.0, "generation_tokens": 30.0, "requests": 2.0, "ttft.sum": 1.0}
    assert delta(before, after) == {"generation_tokens": 20.0, "ttft.sum": 1.0}


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["Authorization"] == "Bearer key" and self.path == "/metrics"
            body = NEW.encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    config = ServerConfig("x", "vllm")
    url = f"http://127.0.0.1:{web.server_port}"
    yield Server(config, url, "m", "vllm", api_key="key")
    web.shutdown()
    web.server_close()


def test_scrape_asks_with_the_key(server):
    assert scrape(server, ENGINE)["running"] == 7.0
    keyless = Server(server.config, server.endpoint, "m", "vllm")
    assert scrape(keyless, ENGINE) == {}
    nowhere = Server(server.config, "http://127.0.0.1:9", "m", "vllm")
    assert scrape(nowhere, ENGINE) == {}


def test_the_sampler_gives_a_series(server):
    seen = threading.Event()
    with Sampler(server, ENGINE, rate=50.0) as sampler:
        for _ in range(200):
            if len(sampler.series["time"]) >= 3:
                break
            seen.wait(0.02)
    series = sampler.series
    assert len(series["time"]) == len(series["running"]) >= 3
    assert series["time"] == sorted(series["time"])
    assert set(series["running"]) == {7.0}
    assert set(series) == {"time", "running", "kv_usage"}
