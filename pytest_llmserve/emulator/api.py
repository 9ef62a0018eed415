"""The OpenAI-compatible API: what a request asks for, checked, and the errors it gets instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from pytest_llmserve.emulator.dialects import Api
from pytest_llmserve.emulator.tokens import Generator, Tokenizer

_NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error; its text is the message."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> bytes:
        error = {
            "message": str(self),
            "type": _NAMES.get(self.status, "Error"),
            "param": self.param,
            "code": self.status,
        }
        return msgspec.json.encode({"error": error})


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Common(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None


class CompletionRequest(_Common):
    prompt: Any = None


class ChatRequest(_Common):
    messages: list[dict[str, Any]] = []


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


_T = TypeVar("_T")


def decode(body: bytes, kind: type[_T]) -> _T:
    """The body as a request of this kind. Raises ApiError 400 that names what is wrong in it."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}") from None


@dataclass(frozen=True)
class Order:
    """A generation, checked and decided: its prompt, how long it gets and what it says."""

    api: Api
    prompt: list[int]
    length: int
    finish: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    token: Callable[[int], int]
    text: Callable[[int], str]


@dataclass(frozen=True)
class Model:
    """What is served: under which names, with which tokenizer, how long, and the text's seed."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    seed: int

    def check_name(self, name: str | None) -> str:
        if name is None or name in self.names:
            return name or self.names[0]
        raise ApiError(404, f"The model `{name}` does not exist.", "model")

    def order(
        self, request: CompletionRequest | ChatRequest, *, longer: int = 0, nonce: int = 0
    ) -> Order:
        """Decide on a request. `longer` tokens are added to its length and `nonce` to its seed.

        Raises ApiError for what vLLM would refuse too.
        """
        self.check_name(request.model)
        api: Api = "chat" if isinstance(request, ChatRequest) else "completions"
        if isinstance(request, ChatRequest):
            if not request.messages:
                raise ApiError(400, "messages must not be empty", "messages")
            prompt = self.tokenizer.chat(request.messages)
        else:
            prompt = self._prompt(request.prompt)
        if request.n not in (None, 1):
            raise ApiError(400, "n must be 1: the emulator gives one answer a request", "n")
        if request.stream_options is not None and not request.stream:
            raise ApiError(
                400, "Stream options can only be defined when `stream=True`.", "stream_options"
            )
        wanted = self._wanted(request, len(prompt))
        generator = Generator(
            prompt, self.seed + (request.seed or 0) + nonce, self.tokenizer.ordinary
        )
        natural = max(generator.natural_length(), request.min_tokens)
        stops = request.ignore_eos is False and natural <= wanted
        length = natural if stops else wanted
        finish = "stop" if stops else "length"
        text = self._writer(generator)
        if request.stop:
            words = [request.stop] if isinstance(request.stop, str) else request.stop
            stopped = _until(text, length, request.min_tokens, [word for word in words if word])
            if stopped is not None:
                pieces, finish = stopped, "stop"
                length, text = len(pieces), pieces.__getitem__
        if longer:
            length, text = max(1, length + longer), self._writer(generator)
        options = request.stream_options or StreamOptions()
        return Order(
            api=api,
            prompt=prompt,
            length=length,
            finish=finish,
            stream=bool(request.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
            token=generator.token,
            text=text,
        )

    def _writer(self, generator: Generator) -> Callable[[int], str]:
        token, text = generator.token, self.tokenizer.text
        return lambda index: text(token(index))

    def _prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
            tokens = prompt
        elif isinstance(prompt, list) and all(isinstance(p, (str, list)) for p in prompt):
            raise ApiError(400, "the emulator takes one prompt a request", "prompt")
        else:
            raise ApiError(400, "prompt must be a string or a list of token ids", "prompt")
        if not tokens:
            raise ApiError(400, "prompt must not be empty", "prompt")
        if min(tokens) < 0 or max(tokens) >= self.tokenizer.vocab:
            worst = min(tokens) if min(tokens) < 0 else max(tokens)
            raise ApiError(400, f"Token id {worst} is out of vocabulary", "prompt")
        return tokens

    def _wanted(self, request: CompletionRequest | ChatRequest, prompt: int) -> int:
        room = self.max_model_len - prompt
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted is None:
            # vLLM's defaults: OpenAI's 16 for completions, all that is left for chat.
            wanted = min(16, room) if isinstance(request, CompletionRequest) else room
        elif wanted < 1:
            raise ApiError(400, f"max_tokens must be at least 1, got {wanted}.", "max_tokens")
        if request.min_tokens < 0 or request.min_tokens > wanted > 0:
            raise ApiError(
                400,
                f"min_tokens must be from 0 to max_tokens ({wanted}), got {request.min_tokens}.",
                "min_tokens",
            )
        if wanted < 1 or wanted > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"you requested {max(wanted, 0)} output tokens and your prompt contains {prompt} "
                f"input tokens, for a total of {prompt + max(wanted, 0)} tokens. Please reduce "
                "the length of the input prompt or the number of requested output tokens.",
                "input_tokens",
            )
        return wanted


def _until(
    text: Callable[[int], str], length: int, least: int, words: list[str]
) -> list[str] | None:
    """The pieces of a text up to the first of `words`, which is cut off; None if none comes."""
    if not words:
        return None
    longest = max(map(len, words))
    pieces: list[str] = []
    written, start = "", 0
    for index in range(length):
        pieces.append(text(index))
        written += pieces[-1]
        if index + 1 <= least:
            start = len(written)
            continue
        places = [p for word in words if (p := written.find(word, start)) >= 0]
        if places:
            return _cut(pieces, min(places))
        start = max(start, len(written) - longest + 1)
    return None


def _cut(pieces: list[str], size: int) -> list[str]:
    """The same number of pieces, of which only the first `size` characters are left."""
    left = []
    for piece in pieces:
        left.append(piece[:size])
        size = max(0, size - len(piece))
    return left
