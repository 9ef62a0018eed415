"""How engines write the same answer differently: stream shapes as data, and the encoder.

Read from the streams and sources of vLLM 0.32, TensorRT-LLM 1.x, SGLang, llama.cpp's server and
Ollama's OpenAI-compatible API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Api = Literal["completions", "chat"]


@dataclass(frozen=True)
class Dialect:
    """One engine's way to stream.

    `role` is the `delta` of the chunk that opens a chat answer (None: there is no such chunk);
    `role_always`: every delta repeats the role. `choice` and `text_choice` are JSON members
    that follow a delta or a text; `chunk` members that follow `choices`. `finish_apart`: the
    reason to finish comes in a chunk of its own. `blank` stands between JSON and line end.
    Every `empty_every`-th token writes no text; the next event has it too. A `comment` line is
    sent before every `comment_every`-th event. `refuses`: the port refuses while loading.
    """

    name: str
    role: str | None = '{"role":"assistant","content":""}'
    role_always: bool = False
    choice: str = ""
    text_choice: str = ""
    chunk: str = ""
    finish_apart: bool = False
    reasoning: str = "reasoning"
    blank: str = ""
    empty_every: int = 0
    comment: str = ""
    comment_every: int = 0
    refuses: bool = True
    metrics: str = "/metrics"


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            Dialect(
                "vllm",
                choice='"token_ids":null',
                text_choice='"stop_reason":null,"prompt_token_ids":null,"token_ids":null',
            ),
            Dialect(
                "tensorrt-llm",
                role='{"role":"assistant"}',
                choice='"stop_reason":null,"disaggregated_params":null',
                text_choice='"stop_reason":null,"disaggregated_params":null',
                reasoning="reasoning_content",
                blank=" ",
                empty_every=7,
                metrics="/prometheus/metrics",
            ),
            Dialect(
                "sglang",
                choice='"matched_stop":null',
                text_choice='"matched_stop":null',
                chunk='"usage":null',
                finish_apart=True,
                reasoning="reasoning_content",
            ),
            Dialect(
                "llama.cpp",
                role='{"role":"assistant","content":null}',
                chunk='"system_fingerprint":"b0-emulated"',
                finish_apart=True,
                reasoning="reasoning_content",
                comment=":\n\n",
                comment_every=16,
                refuses=False,
            ),
            Dialect(
                "ollama",
                role=None,
                role_always=True,
                chunk='"system_fingerprint":"fp_ollama"',
                finish_apart=True,
                metrics="",
            ),
        )
    }
)


@dataclass(frozen=True)
class Usage:
    """Token counts as the server tells them."""

    prompt: int
    cached: int | None = None

    def json(self, made: int) -> str:
        return json.dumps(self.members(made), separators=(",", ":"))

    def members(self, made: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + made,
            "completion_tokens": made,
        }
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        return usage


class Encoder:
    """The events of one streamed answer, as bytes of server-sent events without HTTP framing.

    `reasoning` tokens at the beginning of a chat answer go to the reasoning field.
    """

    def __init__(
        self,
        dialect: Dialect,
        api: Api,
        identity: str,
        created: int,
        model: str,
        *,
        include_usage: bool,
        continuous_usage: bool,
        reasoning: int = 0,
    ) -> None:
        kind = "text_completion" if api == "completions" else "chat.completion.chunk"
        self._dialect = dialect
        self._api = api
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._reasoning = reasoning if api == "chat" else 0
        self._base = (
            f'data: {{"id":"{identity}","object":"{kind}","created":{created},'
            f'"model":{json.dumps(model)}'
        )
        self._events = 0
        self._held = ""

    def opening(self, usage: Usage) -> list[bytes]:
        """What comes before the first token, at its time."""
        if self._api == "completions" or self._dialect.role is None:
            return []
        return [self._chunk(self._delta(self._dialect.role, "null"), usage, 0)]

    def event(self, text: str, made: int, finish: str | None, usage: Usage) -> list[bytes]:
        """One event with `text`, after which `made` tokens are out; `finish` if it is the last."""
        dialect = self._dialect
        self._events += 1
        text = self._held + text
        self._held = ""
        if dialect.empty_every and self._events % dialect.empty_every == 0 and finish is None:
            text, self._held = "", text
        apart = finish is not None and dialect.finish_apart
        reason = "null" if finish is None or apart else f'"{finish}"'
        events = []
        if dialect.comment_every and self._events % dialect.comment_every == 0:
            events.append(dialect.comment.encode())
        events.append(self._chunk(self._choice(text, made, reason), usage, made))
        if apart:
            empty = self._choice("", made, f'"{finish}"', last=True)
            events.append(self._chunk(empty, usage, made))
        return events

    def closing(self, made: int, usage: Usage) -> list[bytes]:
        """What comes after the last token."""
        done = [b"data: [DONE]\n\n"]
        if not self._include_usage:
            return done
        chunk = f'{self._base},"choices":[],"usage":{usage.json(made)}}}{self._dialect.blank}\n\n'
        return [chunk.encode(), *done]

    def _choice(self, text: str, made: int, reason: str, last: bool = False) -> str:
        quoted = f'"{text}"' if text.isascii() and text.isprintable() and not (
            '"' in text or "\\" in text) else json.dumps(text)  # fmt: skip
        if self._api == "completions":
            return (
                f'{{"index":0,"text":{quoted},"logprobs":null,"finish_reason":{reason}'
                f"{_members(self._dialect.text_choice)}}}"
            )
        field = self._dialect.reasoning if made <= self._reasoning else "content"
        role = '"role":"assistant",' if self._dialect.role_always else ""
        delta = "{}" if last and not role else f'{{{role}"{field}":{quoted}}}'
        return self._delta(delta, reason)

    def _delta(self, delta: str, reason: str) -> str:
        return (
            f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}'
            f"{_members(self._dialect.choice)}}}"
        )

    def _chunk(self, choice: str, usage: Usage, made: int) -> bytes:
        if self._continuous:
            extra = f',"usage":{usage.json(made)}'
        else:
            extra = _members(self._dialect.chunk)
        return f'{self._base},"choices":[{choice}]{extra}}}{self._dialect.blank}\n\n'.encode()


def _members(members: str) -> str:
    return f",{members}" if members else ""


def whole(
    api: Api, identity: str, created: int, model: str, text: str, reasoning: str,
    field: str, made: int, finish: str, usage: Usage,
) -> bytes:  # fmt: skip
    """The body of an answer that is not streamed."""
    choice: dict[str, Any] = {"index": 0}
    if api == "completions":
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text}
        if reasoning:
            choice["message"][field] = reasoning
    choice |= {"logprobs": None, "finish_reason": finish, "stop_reason": None}
    body = {
        "id": identity,
        "object": "text_completion" if api == "completions" else "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage.members(made),
    }
    return json.dumps(body, separators=(",", ":")).encode()


def error_event(message: str, blank: str) -> list[bytes]:
    """An error in the middle of a stream, at a status of 200 that was sent long ago."""
    error = {
        "error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}
    }
    return [f"data: {json.dumps(error)}{blank}\n\n".encode(), b"data: [DONE]\n\n"]
