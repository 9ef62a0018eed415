"""Byte-level byte-pair encoding as language models have it, trained on what every Python brings.

Text is first split into words (with the space before each), figures, signs and white space, so no
token reaches over two words; a word is then as many tokens as its pairs merge into.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from collections import Counter
from functools import cache
from itertools import pairwise

_SPLIT = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+|_+|\s+")


class BPE:
    """`merges` merges, learned from the most frequent pairs of `text`."""

    def __init__(self, merges: int, text: str | None = None) -> None:
        text = text or "\n".join(sorted(pydoc_data.topics.topics.values())[:40])
        words = {
            tuple(bytes([b]) for b in word.encode()): n
            for word, n in Counter(_SPLIT.findall(text)).items()
        }
        self._rank: dict[tuple[bytes, bytes], int] = {}
        for rank in range(merges):
            pairs: Counter[tuple[bytes, bytes]] = Counter()
            for word, count in words.items():
                for pair in pairwise(word):
                    pairs[pair] += count
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            self._rank[best] = rank
            words = {
                _merge(word, best) if best[0] in word else word: n for word, n in words.items()
            }
        self._of = cache(self._word)

    def encode(self, text: str) -> list[bytes]:
        return [token for word in _SPLIT.findall(text) for token in self._of(word)]

    def _word(self, word: str) -> tuple[bytes, ...]:
        parts = tuple(bytes([b]) for b in word.encode())
        while len(parts) > 1:
            pairs = [pair for pair in pairwise(parts) if pair in self._rank]
            if not pairs:
                break
            parts = _merge(parts, min(pairs, key=self._rank.__getitem__))
        return parts

    def chat(self, messages: list[dict[str, str]]) -> list[bytes]:
        """ChatML, as Qwen and others have it, with an answer begun."""
        tokens: list[bytes] = []
        for message in messages:
            said = self.encode(f"{message['role']}\n{message['content']}")
            tokens += [b"<|im_start|>", *said, b"<|im_end|>", *self.encode("\n")]
        return [*tokens, b"<|im_start|>", *self.encode("assistant\n")]


def _merge(parts: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)
