"""A made-up tokenizer and a made-up model: text in, tokens out, the same ones every time.

A token is written as a space and a word of five letters that spells its id, so that encoding a
decoded sequence gives the same ids back. Other text is cut at word borders and hashed into the
vocabulary. Nothing here means anything; it only has to be exact, quick and reproducible.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_VOWELS = "aeiou"
_SPELLED = 20 * 5 * 20 * 5 * 20
_PIECE = re.compile(r"<\|[a-z_]+\|>|\s?\w{1,8}|[^\w\s]|\s+")
_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>",
)  # fmt: skip
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """A 64-bit hash of a 64-bit number (the finalizer of SplitMix64): a stateless random source."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Tokenizer:
    """`vocab` ids, the last few of them special tokens, up to `20·5·20·5·20` spelled ones."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.ordinary = min(vocab - len(_SPECIALS), _SPELLED)
        self._special = {text: vocab - 1 - i for i, text in enumerate(_SPECIALS)}
        self._special_text = {token: text for text, token in self._special.items()}

    def text(self, token: int) -> str:
        """What one token writes. Ids of `vocab` and above write nothing."""
        if token >= self.ordinary:
            return self._special_text.get(token, "")
        rest, e = divmod(token, 20)
        rest, d = divmod(rest, 5)
        rest, c = divmod(rest, 20)
        a, b = divmod(rest, 5)
        return f" {_CONSONANTS[a]}{_VOWELS[b]}{_CONSONANTS[c]}{_VOWELS[d]}{_CONSONANTS[e]}"

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(self.text, tokens))

    def encode(self, text: str) -> list[int]:
        return [self._token(piece) for piece in _PIECE.findall(text)]

    def _token(self, piece: str) -> int:
        special = self._special.get(piece)
        if special is not None:
            return special
        word = piece.strip()
        if len(word) == 5:
            a, b, c, d, e = (
                (_VOWELS if i % 2 else _CONSONANTS).find(letter) for i, letter in enumerate(word)
            )
            token = (((a * 5 + b) * 20 + c) * 5 + d) * 20 + e
            if min(a, b, c, d, e) >= 0 and token < self.ordinary:
                return token
        return zlib.crc32(piece.encode(errors="surrogatepass")) % self.ordinary

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation as one prompt: each turn fenced by special tokens, then an open answer."""
        start, end = self._special["<|im_start|>"], self._special["<|im_end|>"]
        tokens: list[int] = []
        for message in messages:
            role = self._special.get(f"<|{message.get('role')}|>", self._special["<|user|>"])
            tokens += [start, role, *self.encode(_content(message.get("content"))), end]
        return [*tokens, start, self._special["<|assistant|>"]]


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


class Generator:
    """The answer to one prompt: token `i` is a function of seed, prompt and `i` alone."""

    def __init__(self, prompt: Sequence[int], seed: int, ordinary: int) -> None:
        self._key = hash((seed, *prompt)) & _MASK
        self._ordinary = ordinary

    def token(self, index: int) -> int:
        return mix(self._key + index) % self._ordinary

    def natural_length(self) -> int:
        """Tokens after which the model would stop of itself: 16 to 512."""
        return 16 + mix(self._key ^ 0x5DEECE66D) % 497
