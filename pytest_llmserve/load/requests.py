"""The bytes of each request of a plan: a function of the seed and the request's place alone."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.tokens import WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_llmserve.load.plan import LoadPlan, Target
    from pytest_llmserve.load.tokens import Prompts

#: Phases of a load; each has prompts of its own.
WARMUP, PLANNED = 0, 1


class Requests:
    """Makes requests: `make(phase, user, number)` gives the bytes and the wanted lengths."""

    def __init__(self, target: Target, plan: LoadPlan, prompts: Prompts) -> None:
        self._plan, self._prompts = plan, prompts
        workload = plan.workload
        self._texts: Sequence[str] = [str(i) for i in prompts.ids] or WORDS
        self._as_ids = bool(prompts.ids)
        body = {"model": target.model, "stream": workload.stream}
        if workload.stream:
            body["stream_options"] = {"include_usage": True}
        fixed = json.dumps({**body, **target.body}, separators=(",", ":"))
        chat = workload.api == "chat"
        # The prompt is the last field, so that a body is one text between two others.
        self._open = (
            fixed[:-1].replace("%", "%%")
            + ',"max_tokens":%d,'
            + ('"messages":[{"role":"user","content":"' if chat else '"prompt":')
        )
        self._close = '"}]}' if chat else "}"
        self._quoted = not chat and not self._as_ids
        parts = urlsplit(target.url)
        path = parts.path.rstrip("/") + ("/v1/chat/completions" if chat else "/v1/completions")
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
        self._head = f"POST {path} HTTP/1.1\r\n{lines}Content-Length: "

    def make(self, phase: int, user: int, number: int) -> tuple[bytes, int, int]:
        """The request `number` of `user` (-1 in an open loop): bytes, prompt and output tokens."""
        workload = self._plan.workload
        want_prompt, want_output = workload.prompt_tokens, workload.output_tokens
        shared = min(workload.shared_prefix, want_prompt)
        parts = self._draw((phase << 1) | 1, 0, shared) if shared else []
        length = want_prompt if self._as_ids else self._prompts.words(want_prompt)
        place = ((user + 1) << 40) | number
        parts += self._draw(phase << 1, place, max(0, length - shared))
        if self._as_ids:
            text = f"[{','.join(parts)}]"
        else:
            text = " ".join(parts)
            if self._quoted:
                text = f'"{text}"'
        body = (self._open % want_output + text + self._close).encode()
        request = f"{self._head}{len(body)}\r\n\r\n".encode("latin-1") + body
        return request, want_prompt, want_output

    def _draw(self, stream: int, place: int, count: int) -> list[str]:
        seed = (((self._plan.seed << 80) | place) << 2) | stream
        return random.Random(seed).choices(self._texts, k=count)
