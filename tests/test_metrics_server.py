from __future__ import annotations

import itertools
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.engines.vllm import ENGINE
from pytest_llmserve.metrics.server import Sampler, between, delta, parse, scrape, summarize
from pytest_llmserve.servers import Server, ServerConfig
from pytest_llmserve.verdict.slo import SERVER as SERVER_NAMES

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
    assert set(series) == {"time", "running", "kv_usage", "generation_tokens", "requests"}


def test_the_sampler_reads_before_and_after_however_slow_it_is(server):
    with Sampler(server, ENGINE, rate=0.01) as sampler:
        assert len(sampler.series["time"]) == 1
        began = time.monotonic()
    assert len(sampler.series["time"]) == 2
    assert sampler.series["time"][0] < began < sampler.series["time"][1]


def test_a_sampler_of_a_server_that_is_gone_has_nothing(server):
    nowhere = Server(server.config, "http://127.0.0.1:9", "m", "vllm")
    with Sampler(nowhere, ENGINE) as sampler:
        pass
    assert sampler.series == {"time": []}


SERIES = {
    "time": [0.0, 10.0, 20.0, 30.0],
    "running": [0.0, 8.0, 4.0, 0.0],
    "waiting": [0.0, math.nan, 3.0, 0.0],
    "kv_usage": [0.0, 0.5, 0.75, 0.01],
    "generation_tokens": [100.0, 200.0, 600.0, 700.0],
}


def test_what_a_server_says_as_metrics():
    grown = {
        "preemptions": 2.0,
        "prefix_hits": 30.0,
        "prefix_queries": 120.0,
        "spec_drafts": 10.0,
        "spec_draft_tokens": 40.0,
        "spec_accepted_tokens": 25.0,
        "queue_time.sum": 3.0,
        "queue_time.count": 6.0,
    }
    found = summarize(SERIES, grown, {"kv_usage": 0.01}, (5.0, 25.0))
    assert found["running"] == {"mean": 6.0, "max": 8.0}
    assert found["waiting"] == {"mean": 3.0, "max": 3.0}
    assert found["kv_usage"] == {"mean": 0.625, "max": 0.75, "last": 0.01}
    assert found["preemptions"] == 2.0
    assert found["prefix_hit_rate"] == 0.25
    assert found["acceptance_rate"] == 0.625
    assert found["accepted_length"] == 3.5
    assert found["queue_time"] == {"mean": 0.5}
    assert found["ttft"] == {"mean": None}
    assert found["output_throughput"] == pytest.approx((650 - 150) / 20)
    assert found["prompt_throughput"] is None


def test_a_server_that_says_nothing_has_the_same_names_without_values():
    told = summarize(SERIES, {}, {}, (5.0, 25.0))
    silent = summarize({"time": []}, {}, {}, (5.0, 25.0))
    assert set(_leaves(told)) == set(_leaves(silent))
    assert set(_leaves(silent).values()) == {None}
    assert {f"server.{name}" for name in _leaves(silent)} == set(SERVER_NAMES)


def test_no_rate_without_a_whole_window():
    times, values = SERIES["time"], SERIES["generation_tokens"]
    assert between(times, values, 0.0, 30.0) == 600.0
    assert between(times, values, -1.0, 30.0) is None
    assert between(times, values, 0.0, 31.0) is None
    assert between(times, values, 5.0, 5.0) is None
    assert between(times, [5.0, 6.0, 0.0, 1.0], 0.0, 30.0) is None  # it started anew
    assert between(times, [math.nan, 200.0, 600.0, math.nan], 12.0, 18.0) == pytest.approx(240.0)


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 1e4)), min_size=2, max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_growth_is_additive_and_within_the_counter(steps, a, b, c):
    times = list(itertools.accumulate((dt for dt, _ in steps), initial=0.0))
    values = list(itertools.accumulate((dv for _, dv in steps), initial=7.0))
    first, middle, last = (times[-1] * x for x in sorted((a, b, c)))
    whole = between(times, values, first, last)
    assert (whole is None) == (first == last)
    if first < middle < last:
        parts = [between(times, values, first, middle), between(times, values, middle, last)]
        assert sum(parts) == pytest.approx(whole, abs=1e-6)
        assert 0 <= whole <= (values[-1] - values[0]) * (1 + 1e-9)


def _leaves(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
