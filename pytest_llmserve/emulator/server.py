"""The emulated server: one thread, one loop, and a deadline that everything else gives way to.

Each turn waits for sockets until the next token is due, lets due tokens go first, and then reads
what clients have sent. What can wait (rendering metrics, writing the truth log, collecting
garbage) is done where there is time before the next deadline.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from itertools import count

import msgspec

from pytest_llmserve.emulator.answer import Answer, Job
from pytest_llmserve.emulator.api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Model,
    TokenizeRequest,
    decode,
)
from pytest_llmserve.emulator.dialects import DIALECTS
from pytest_llmserve.emulator.faults import Faults
from pytest_llmserve.emulator.http import Connection, HttpServer, Request
from pytest_llmserve.emulator.kv import BlockPool
from pytest_llmserve.emulator.pacing import Batched, Exact, MaxRate, Pacer
from pytest_llmserve.emulator.physics import Noise
from pytest_llmserve.emulator.scheduler import Scheduler, Sequence
from pytest_llmserve.emulator.settings import Settings
from pytest_llmserve.emulator.stats import (
    CONTENT_TYPE,
    OWN_METRICS,
    Stats,
    VllmCollector,
    collector_for,
    render,
)
from pytest_llmserve.emulator.tokens import Tokenizer
from pytest_llmserve.emulator.truth import TruthLog
from pytest_llmserve.load.priority import scheduled_soon
from pytest_llmserve.poller import READ, Poller, tighten_timers

try:
    VERSION = installed_version("pytest-llmserve")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "unknown"

# Rows of the truth log that may wait for a better time to be written.
_MOST_ROWS = 100_000

# Work that can wait is begun with so much time before the next deadline, or after so long a wait.
_SLACK = 0.003
_PATIENCE = 0.05
_IDLE = 0.2


class Emulator:
    """A server made of `settings`. `run` serves until SIGTERM or SIGINT."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._poller = Poller()
        self._http = HttpServer(self._poller, clock, self._handle)
        self._dialect = DIALECTS[settings.dialect]
        self._faults = Faults(settings.faults, settings.seed)
        self._model = Model(
            names=settings.served,
            tokenizer=Tokenizer(settings.machine.shape.vocab),
            max_model_len=settings.max_model_len,
            seed=settings.seed,
        )
        self._pool = BlockPool(
            settings.blocks,
            settings.block_size,
            prefix_caching=settings.prefix_caching,
            forgetful=self._faults.get("no-prefix-reuse") is not None,
        )
        self._scheduler = Scheduler(settings.policy, self._pool, settings.seed)
        self._stats = Stats(self._gauges)
        self._collector = collector_for(settings.dialect, self._stats, settings.served[0])
        self._own = VllmCollector(self._stats, settings.served[0])
        self._truth = None if settings.truth_log is None else TruthLog(settings.truth_log)
        self._ready_at = 0.0
        self._ready = False
        self._pacer = self._make_pacer(clock())
        self._numbers = count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self._stopping = False
        crash = self._faults.get("crash")
        self._crash_at = None if crash is None else int(crash["tokens"])

    # life

    def run(self) -> None:
        """Open the port, serve, and come back when a signal says so.

        Raises ServerError if the port cannot be had.
        """
        wake_read, wake_write = self._catch_signals()
        try:
            self._load()
            if not self._stopping:
                gc.collect()
                gc.freeze()
                gc.disable()
                tighten_timers()
                # A server without a schedule never sleeps, and would keep everyone else waiting.
                punctual = self._settings.schedule != "max-rate"
                with scheduled_soon() if punctual else contextlib.nullcontext():
                    self._loop(wake_read)
        finally:
            self._http.close()
            if self._truth is not None:
                self._truth.close()
            signal.set_wakeup_fd(-1)
            wake_read.close()
            wake_write.close()
            self._poller.close()

    def _catch_signals(self) -> tuple[socket.socket, socket.socket]:
        read, write = socket.socketpair()
        for end in (read, write):
            end.setblocking(False)
        signal.set_wakeup_fd(write.fileno())
        stubborn = self._faults.get("ignore-sigterm") is not None
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._poller.register(read.fileno(), READ)
        return read, write

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _load(self) -> None:
        """Say what an engine says while it loads, and take as long as was asked for."""
        settings, machine = self._settings, self._settings.machine
        say(f"EMULATED {machine.shape.name} on {machine.hardware.title}: no model is loaded, and "
            "no time it takes was measured there")  # fmt: skip
        leak = self._faults.get("leak-children")
        if leak is not None:
            for _ in range(int(leak["count"])):
                _leak_child(leak["seconds"], own_session=bool(leak["session"]))
        slow, crash = self._faults.get("slow-start"), self._faults.get("crash-at-load")
        seconds = settings.load_time + (0.0 if slow is None else slow["seconds"])
        say(f"Loading weights ({machine.precision.weights}, emulated), {seconds:.1f} s")
        if not self._dialect.refuses:
            self._listen()
        end = self._clock() + seconds
        while not self._stopping and self._clock() < end:
            for fd, mask in self._poller.poll(min(end, self._clock() + 0.05)):
                self._http.dispatch(fd, mask)
            self._http.continue_connections()
        if crash is not None:
            say("EngineCore failed to start: crash-at-load (emulated fault)")
            sys.exit(int(crash["code"]))
        if self._dialect.refuses and not self._stopping:
            self._listen()
        tokens = self._pool.count * self._pool.size
        say(f"KV cache size: {tokens:,} tokens; maximum concurrency for "
            f"{settings.max_model_len:,} tokens per request: "
            f"{tokens / settings.max_model_len:.2f}x (emulated)")  # fmt: skip
        if self._faults.get("never-ready") is None and not self._stopping:
            self._ready = True
            self._ready_at = self._clock()
            self._pacer = self._make_pacer(self._ready_at)
            say("Ready (emulated)")

    def _listen(self) -> None:
        port = self._http.listen(self._settings.host, self._settings.port)
        host = self._settings.host
        shown = f"[{host}]" if ":" in host else host
        say(f"Listening on http://{shown}:{port}")

    def _make_pacer(self, ready_at: float) -> Pacer:
        settings = self._settings
        match settings.schedule:
            case "exact":
                return Exact(settings.ttft, settings.tpot, self._stats, self._clock)
            case "max-rate":
                return MaxRate(self._stats, self._clock)
            case _:
                noise = Noise(settings.noise, settings.run_noise, settings.seed)
                return Batched(
                    self._scheduler, settings.machine, noise, self._faults, self._stats,
                    self._clock, ready_at,
                )  # fmt: skip

    # the loop

    def _loop(self, wake: socket.socket) -> None:
        clock, poller, pacer, http = self._clock, self._poller, self._pacer, self._http
        wake_fd = wake.fileno()
        clean = True
        while not self._stopping:
            due = pacer.due
            if self._timers and (due is None or self._timers[0][0] < due):
                due = self._timers[0][0]
            if self._chores(due):
                continue
            ready = poller.poll(due if due is not None or clean else clock() + _IDLE)
            if due is None and not ready and not clean:
                gc.collect()
                clean = True
                continue
            due = pacer.due
            if due is not None and due <= clock():
                pacer.fire()
                if self._crash_at is not None and self._stats.generation_tokens >= self._crash_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            while self._timers and self._timers[0][0] <= clock():
                heapq.heappop(self._timers)[2]()
            for fd, mask in ready:
                clean = False
                if fd == wake_fd:
                    wake.recv(64)
                else:
                    http.dispatch(fd, mask)
            http.continue_connections()

    def _chores(self, due: float | None) -> bool:
        """Do one thing that can wait, if now is the time for it; whether one was done."""
        now = self._clock()
        slack = float("inf") if due is None else due - now
        if self._jobs and (slack > _SLACK or now - self._jobs[0][0] > _PATIENCE):
            self._jobs.popleft()[1]()
            return True
        truth = self._truth
        if truth is not None and truth.pending:
            if due is None:
                truth.flush()
                return True
            if truth.pending > 256 and slack > _SLACK / 3:
                truth.flush(32)
                return True
            if truth.pending > _MOST_ROWS:
                truth.flush()
        return False

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._numbers), what))

    # requests

    def _handle(self, request: Request, connection: Connection) -> None:
        try:
            self._route(request, connection)
        except ApiError as error:
            connection.answer(error.status, error.body())

    def _route(self, request: Request, connection: Connection) -> None:
        path, method = request.path.rstrip("/") or "/", request.method
        post = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/reset_prefix_cache": self._reset_prefix_cache,
        }
        get = {
            "/health": self._health,
            "/ping": self._health,
            "/version": self._version,
            "/v1/models": self._models,
            "/server_info": self._server_info,
            self._dialect.metrics: self._metrics,
            OWN_METRICS: self._metrics,
        }
        if self._dialect.name == "ollama":
            get["/api/version"] = self._version
        if self._dialect.name == "tensorrt-llm":
            get["/metrics"] = self._iteration_stats
        if path.startswith("/v1"):
            self._authorize(request)
        if method == "POST" and path in post:
            self._require_ready()
            post[path](request, connection)
        elif method in ("GET", "HEAD", "POST") and path in get:
            get[path](request, connection)
        elif path in post or path in get:
            raise ApiError(405, "Method Not Allowed")
        else:
            raise ApiError(404, "Not Found")

    def _authorize(self, request: Request) -> None:
        key = self._settings.api_key
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            raise ApiError(401, "Unauthorized")

    def _require_ready(self) -> None:
        if not self._ready:
            raise ApiError(503, "The model is loading (emulated).")

    def _health(self, request: Request, connection: Connection) -> None:
        self._require_ready()
        connection.answer(200, b"", "text/plain")

    def _version(self, request: Request, connection: Connection) -> None:
        answer_json(connection, {"version": VERSION, "emulated": True, "engine": "emulator"})

    def _models(self, request: Request, connection: Connection) -> None:
        models = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "pytest-llmserve-emulator",
                "root": self._settings.model,
                "parent": None,
                "max_model_len": self._settings.max_model_len,
            }
            for name in self._settings.served
        ]
        answer_json(connection, {"object": "list", "data": models})

    def _server_info(self, request: Request, connection: Connection) -> None:
        answer_json(connection, {"emulated": True, "config": self._settings.as_dict()})

    def _metrics(self, request: Request, connection: Connection) -> None:
        collector = self._own if request.path == OWN_METRICS else self._collector

        def answer() -> None:
            if connection.open:
                connection.answer(200, render(collector), CONTENT_TYPE)

        self._jobs.append((self._clock(), answer))

    def _iteration_stats(self, request: Request, connection: Connection) -> None:
        """TensorRT-LLM's own /metrics, which is empty unless statistics are switched on."""
        answer_json(connection, [])

    def _reset_prefix_cache(self, request: Request, connection: Connection) -> None:
        self._pool.forget()
        connection.answer(200, b"", "text/plain")

    def _tokenize(self, request: Request, connection: Connection) -> None:
        asked = decode(request.body, TokenizeRequest)
        self._model.check_name(asked.model)
        tokenizer = self._model.tokenizer
        if asked.messages is not None:
            tokens = tokenizer.chat(asked.messages)
        elif asked.prompt is not None:
            tokens = tokenizer.encode(asked.prompt)
        else:
            raise ApiError(400, "prompt or messages must be given", "prompt")
        answer_json(
            connection,
            {"count": len(tokens), "max_model_len": self._model.max_model_len, "tokens": tokens},
        )

    def _detokenize(self, request: Request, connection: Connection) -> None:
        asked = decode(request.body, DetokenizeRequest)
        self._model.check_name(asked.model)
        vocab = self._model.tokenizer.vocab
        if any(not 0 <= token < vocab for token in asked.tokens):
            raise ApiError(400, f"tokens must be ids from 0 to {vocab - 1}", "tokens")
        answer_json(connection, {"prompt": self._model.tokenizer.decode(asked.tokens)})

    def _completions(self, request: Request, connection: Connection) -> None:
        self._generate(decode(request.body, CompletionRequest), request, connection)

    def _chat(self, request: Request, connection: Connection) -> None:
        self._generate(decode(request.body, ChatRequest), request, connection)

    def _generate(
        self, asked: CompletionRequest | ChatRequest, request: Request, connection: Connection
    ) -> None:
        trouble = self._faults.draw()
        if trouble.refusal == 0:
            connection.drop(reset=True)
            return
        if trouble.refusal is not None:
            raise ApiError(trouble.refusal, "An emulated fault answers instead of the engine.")
        limit = self._settings.max_queued
        if limit is not None and self._pacer.load()[1] >= limit:
            self._stats.rejected += 1
            raise ApiError(503, "The server is overloaded: its waiting queue is full.")
        order = self._model.order(asked, longer=trouble.length_error, nonce=trouble.nonce)
        number = next(self._numbers)
        prefix = "cmpl" if order.api == "completions" else "chatcmpl"
        given = request.headers.get("x-request-id")
        job = Job(
            identity=f"{prefix}-{given or f'{number:08x}'}",
            api=order.api,
            model=asked.model or self._settings.served[0],
            created=int(time.time()),
            arrival=request.arrival,
            stream=order.stream,
            include_usage=order.include_usage,
            continuous_usage=order.continuous_usage,
            finish=order.finish,
            reasoning=min(self._settings.reasoning_tokens, order.length - 1),
            text=order.text,
            cached_details=self._settings.cached_details,
        )
        answer = Answer(
            job,
            Sequence(order.prompt, order.length, order.token),
            connection,
            self._dialect,
            trouble,
            clock=self._clock,
            truth=self._truth,
            events_per_write=self._settings.events_per_write,
            after=self._after,
        )
        answer.on_abort = self._pacer.abort
        if self._truth is not None:
            self._truth.add((job.identity, 0, job.arrival, job.arrival, job.arrival))
        try:
            self._pacer.submit(answer)
        except ValueError as error:
            connection.on_lost = None
            raise ApiError(400, f"The request cannot be served: {error}.") from None

    def _gauges(self) -> dict[str, float]:
        running, waiting = self._pacer.load()
        totals = self._scheduler.totals
        return {
            "running": running,
            "waiting": waiting,
            "kv_usage": self._pool.usage,
            "preemptions": totals.preemptions,
            "queries": totals.prefix_queries,
            "hits": totals.prefix_hits,
            "speculating": self._settings.policy.draft_tokens,
            "drafts": totals.drafts,
            "draft_tokens": totals.draft_tokens,
            "accepted_tokens": totals.accepted_tokens,
        }


def answer_json(connection: Connection, value: object) -> None:
    connection.answer(200, msgspec.json.encode(value))


def say(text: str) -> None:
    """A line of the server's log."""
    print(f"emulator: {text}", flush=True)


def _leak_child(seconds: float, *, own_session: bool) -> None:
    """A child process that nobody ends or waits for; it ends by itself after `seconds`."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep({seconds!r})"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=own_session,
    )
    say(f"left a child process behind: {child.pid}")
    child.returncode = 0  # forget it, so that nothing warns of it at the end
