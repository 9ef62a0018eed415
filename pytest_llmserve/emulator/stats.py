"""What the emulated server counts, shown in the names of vLLM's `/metrics`.

Counting must not disturb the schedule, so it is plain numbers here; `prometheus_client` renders
them when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pytest_llmserve.engines import get_engine

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4)
_ERROR = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1, 1.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts by upper bound, and a sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by bound, as Prometheus wants them."""
        pairs, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs


class Stats:
    """All counters of one server. `gauges` reads the present state: our gauge names to values."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        self.gauges = gauges
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self.rejected = 0
        self.slips = 0
        self.ttft = Histogram(_TTFT)
        self.itl = Histogram(_ITL)
        self.tpot = Histogram(_ITL)
        self.e2e = Histogram(_LATENCY)
        self.queue_time = Histogram(_LATENCY)
        self.prefill_time = Histogram(_LATENCY)
        self.decode_time = Histogram(_LATENCY)
        self.prompt_length = Histogram(_TOKENS)
        self.output_length = Histogram(_TOKENS)
        self.step_tokens = Histogram(_TOKENS)
        self.schedule_error = Histogram(_ERROR)


class NamedCollector(Collector):
    """The same numbers under another engine's names: the first of each that its module reads."""

    def __init__(self, stats: Stats, model: str, names: Mapping[str, tuple[str, ...]]) -> None:
        self._stats = stats
        self._model = model
        self._names = names

    def collect(self) -> Iterator[Metric]:
        s, now = self._stats, self._stats.gauges()
        values: dict[str, float | Histogram] = {
            "running": now["running"],
            "waiting": now["waiting"],
            "kv_usage": now["kv_usage"],
            "prompt_tokens": s.prompt_tokens,
            "cached_tokens": s.cached_tokens,
            "generation_tokens": s.generation_tokens,
            "requests": s.finished["stop"] + s.finished["length"],
            "preemptions": now["preemptions"],
            "prefix_queries": now["queries"],
            "prefix_hits": now["hits"],
            "spec_drafts": now["drafts"],
            "spec_draft_tokens": now["draft_tokens"],
            "spec_accepted_tokens": now["accepted_tokens"],
            "ttft": s.ttft,
            "queue_time": s.queue_time,
            "e2e": s.e2e,
        }
        yield _gauge("llmserve_emulated", "1: no real engine is behind this", 1, self._model)
        for name, (spelled, *_older) in self._names.items():
            value = values[name]
            if isinstance(value, Histogram):
                yield _histogram(spelled, name, value, self._model)
            elif spelled.endswith("_total"):
                yield _counter(spelled.removesuffix("_total"), name, value, self._model)
            else:
                yield _gauge(spelled, name, value, self._model)


class VllmCollector(Collector):
    """`Stats` as metric families with vLLM's names and one label, `model_name`."""

    def __init__(self, stats: Stats, model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        s, now = self._stats, self._stats.gauges()
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        yield gauge("llmserve_emulated", "1: no real engine is behind this", 1)
        yield gauge("vllm:num_requests_running", "Requests in the running batch.", now["running"])
        yield gauge("vllm:num_requests_waiting", "Requests waiting.", now["waiting"])
        yield gauge("vllm:kv_cache_usage_perc", "KV-cache usage, 1 is all.", now["kv_usage"])
        yield counter("vllm:prompt_tokens", "Prompt tokens processed.", s.prompt_tokens)
        yield counter("vllm:prompt_tokens_cached", "Cached prompt tokens.", s.cached_tokens)
        yield counter("vllm:generation_tokens", "Tokens generated.", s.generation_tokens)
        yield counter("vllm:num_preemptions", "Preemptions.", now["preemptions"])
        yield counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", now["queries"]
        )
        yield counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", now["hits"])
        yield counter("vllm:admission_rejections", "Requests rejected.", s.rejected)
        success = CounterMetricFamily(
            "vllm:request_success",
            "Requests finished (emulated).",
            labels=("model_name", "finished_reason"),
        )
        for reason, count in s.finished.items():
            success.add_metric((self._model, reason), count)
        yield success
        if now["speculating"]:
            yield counter("vllm:spec_decode_num_drafts", "Drafts.", now["drafts"])
            yield counter("vllm:spec_decode_num_draft_tokens", "Draft tokens.", now["draft_tokens"])
            yield counter(
                "vllm:spec_decode_num_accepted_tokens", "Accepted.", now["accepted_tokens"]
            )
        yield histogram("vllm:time_to_first_token_seconds", "Time to first token.", s.ttft)
        yield histogram("vllm:inter_token_latency_seconds", "Inter-token latency.", s.itl)
        yield histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per output token.", s.tpot
        )
        yield histogram("vllm:e2e_request_latency_seconds", "Request latency.", s.e2e)
        yield histogram("vllm:request_queue_time_seconds", "Time waiting.", s.queue_time)
        yield histogram("vllm:request_prefill_time_seconds", "Time in prefill.", s.prefill_time)
        yield histogram("vllm:request_decode_time_seconds", "Time in decode.", s.decode_time)
        yield histogram("vllm:request_prompt_tokens", "Prompt lengths.", s.prompt_length)
        yield histogram("vllm:request_generation_tokens", "Output lengths.", s.output_length)
        yield histogram("vllm:iteration_tokens_total", "Tokens a step.", s.step_tokens)
        yield histogram(
            "llmserve_schedule_error_seconds",
            "How late a token left, against its schedule.",
            s.schedule_error,
        )
        yield counter(
            "llmserve_schedule_slips", "Times the schedule was given up and restarted.", s.slips
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _gauge(name, text, value, self._model)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return _counter(name, text, value, self._model)

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        return _histogram(name, text, histogram, self._model)


def _gauge(name: str, text: str, value: float, model: str) -> Metric:
    family = GaugeMetricFamily(name, f"{text} (emulated)", labels=("model_name",))
    family.add_metric((model,), value)
    return family


def _counter(name: str, text: str, value: float, model: str) -> Metric:
    family = CounterMetricFamily(name, f"{text} (emulated)", labels=("model_name",))
    family.add_metric((model,), value)
    return family


def _histogram(name: str, text: str, histogram: Histogram, model: str) -> Metric:
    family = HistogramMetricFamily(name, f"{text} (emulated)", labels=("model_name",))
    family.add_metric((model,), histogram.buckets(), histogram.sum)
    return family


#: Where an emulated server tells its own account, in vLLM's words whatever its dialect is.
OWN_METRICS = "/emulator/metrics"


def collector_for(dialect: str, stats: Stats, model: str) -> Collector:
    """The metrics of a dialect: vLLM's in full, of the others what their engine modules read."""
    if dialect == "vllm":
        return VllmCollector(stats, model)
    return NamedCollector(stats, model, get_engine(dialect).counters)


def render(collector: Collector) -> bytes:
    """The text that `/metrics` answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
