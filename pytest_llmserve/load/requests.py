"""The bytes of each request of a plan: a function of the seed and the request's place alone."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.files import read_samples, read_trace
from pytest_llmserve.load.plan import Trace
from pytest_llmserve.load.tokens import HEAD, Texts

if TYPE_CHECKING:
    from pytest_llmserve.load.files import Sample
    from pytest_llmserve.load.plan import Lengths, LoadPlan, Target
    from pytest_llmserve.load.tokens import Prompts

#: Phases of a load; each has prompts of its own.
WARMUP, PLANNED = 0, 1

# What a seeded stream of random numbers is for.
_PROMPT, _REPLY, _PREFIX, _LENGTHS, _GROUP, _START = range(6)

#: A message: who says it, and the texts of its tokens (ids or words).
_Message = tuple[str, list[str]]


class Requests:
    """Makes requests: `make(phase, user, number)` gives the bytes and the wanted lengths."""

    def __init__(self, target: Target, plan: LoadPlan, prompts: Prompts) -> None:
        self._plan = plan
        workload = plan.workload
        self._samples = read_samples(workload.dataset) if workload.dataset else []
        self._trace = read_trace(plan.arrivals.file) if isinstance(plan.arrivals, Trace) else []
        self._as_ids = bool(prompts.ids) and not self._samples
        if prompts.ids:
            self._texts = Texts([str(i) for i in prompts.ids], [1] * len(prompts.ids))
            self._overhead = self._turn = 0
        else:
            self._texts = Texts(prompts.words, prompts.tokens)
            self._overhead = prompts.overhead
            self._turn = prompts.turn if workload.api == "chat" else 0
        body = {"model": target.model, "stream": workload.stream}
        if workload.stream:
            body["stream_options"] = {"include_usage": True}
        # The prompt is the last field, so that a body is made by joining texts.
        self._open = json.dumps({**body, **target.body}, separators=(",", ":"))[:-1]
        parts = urlsplit(target.url)
        end = "/v1/chat/completions" if workload.api == "chat" else "/v1/completions"
        headers = {
            "Host": parts.netloc.rpartition("@")[2],
            "User-Agent": "pytest-llmserve",
            "Accept": "text/event-stream" if workload.stream else "application/json",
            "Content-Type": "application/json",
            **target.headers,
        }
        for name, value in headers.items():
            if any(c in "\r\n\0" for c in name + value):
                raise LoadError(f"the request header {name!r} has a line break in it: remove it")
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._head = f"POST {parts.path.rstrip('/')}{end} HTTP/1.1\r\n{lines}Content-Length: "

    def make(self, phase: int, user: int, number: int) -> tuple[bytes, int, int]:
        """The request `number` of `user` (-1 in an open loop): bytes, prompt and output tokens.

        Prompt tokens are -1 where nobody knows them before the server has counted.
        """
        place = (user + 1) << 40 | number
        if self._samples:
            sample = self._sample(phase, user, number)
            messages: list[_Message] = [("user", [sample.prompt])]
            want_prompt = -1
            want_output = sample.output_tokens or self._lengths(phase, place, number)[1]
        else:
            want_prompt, want_output = self._lengths(phase, place, number)
            turn = number % self._plan.workload.turns if phase == PLANNED else 0
            messages = self._conversation(phase, place, turn, want_prompt)
        content = self._content(messages)
        body = f'{self._open},"max_tokens":{want_output},{content}}}'.encode()
        request = f"{self._head}{len(body)}\r\n\r\n".encode("latin-1") + body
        return request, want_prompt, want_output

    def _sample(self, phase: int, user: int, number: int) -> Sample:
        """The users of a closed loop begin at places of their own and go on from there."""
        start = self._random(phase, _START, user + 1).randrange(len(self._samples))
        return self._samples[(start + number) % len(self._samples)]

    def _lengths(self, phase: int, place: int, number: int) -> tuple[int, int]:
        """Prompt and output tokens of one request; of a turn with all that was said before."""
        workload = self._plan.workload
        if self._trace and phase == PLANNED:
            row = self._trace[number]
            return (
                row.prompt_tokens or workload.prompt_tokens,
                row.output_tokens or workload.output_tokens,
            )
        turn = number % workload.turns if phase == PLANNED else 0
        prompt = workload.prompt_tokens * (turn + 1) + workload.output_tokens * turn
        source = self._random(phase, _LENGTHS, place)
        # In this order always: the second is the same whether or not the first is drawn.
        drawn = [
            lengths and _draw(lengths, source)
            for lengths in (workload.output_lengths, workload.prompt_lengths)
        ]
        return drawn[1] or prompt, drawn[0] or workload.output_tokens

    def _conversation(self, phase: int, place: int, turn: int, want: int) -> list[_Message]:
        """What is sent in this turn: all that was said before, and the new question."""
        workload, first = self._plan.workload, place - turn
        length = max(0, (workload.prompt_tokens if turn else want) - self._overhead)
        group = self._random(phase, _GROUP, first).randrange(workload.prefixes)
        shared = min(workload.shared_prefix, length)
        prefix = self._texts_of(phase, _PREFIX, group, shared)
        messages: list[_Message] = [
            ("user", prefix + self._texts_of(phase, _PROMPT, first, length - shared))
        ]
        # What a template puts between the turns is taken from the question, then the answer.
        question = max(0, workload.prompt_tokens - self._turn)
        reply = workload.prompt_tokens + workload.output_tokens - self._turn - question
        for at in range(first + 1, place + 1):
            messages.append(("assistant", self._texts_of(phase, _REPLY, at, reply)))
            messages.append(("user", self._texts_of(phase, _PROMPT, at, question)))
        return messages

    def _content(self, messages: list[_Message]) -> str:
        head = [] if self._samples else [HEAD]
        if self._plan.workload.api == "chat":
            said = [{"role": role, "content": " ".join(head + texts)} for role, texts in messages]
            return f'"messages":{json.dumps(said)}'
        texts = [text for _, message in messages for text in message]
        if self._as_ids:
            return f'"prompt":[{",".join(texts)}]'
        return f'"prompt":{json.dumps(" ".join(head + texts))}'

    def _texts_of(self, phase: int, purpose: int, place: int, tokens: int) -> list[str]:
        return self._texts.draw(tokens, self._random(phase, purpose, place)) if tokens > 0 else []

    def _random(self, phase: int, purpose: int, place: int) -> random.Random:
        return random.Random((self._plan.seed << 80 | place) << 4 | phase << 3 | purpose)


def _draw(lengths: Lengths, source: random.Random) -> int:
    if lengths.kind == "uniform":
        return source.randint(lengths.low, lengths.high)
    normal = source.gauss(0.0, 1.0) * lengths.spread
    if lengths.kind == "normal":
        value = lengths.middle + normal
    else:
        value = lengths.middle * math.exp(min(normal, 50.0))
    return min(max(round(value), lengths.low), lengths.high)
