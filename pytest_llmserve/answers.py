"""What a server answers, to compare: the same prompts, greedy, alone or many at once.

For tests of whether something (speculation, a full KV cache, another engine) changes answers. How
fast they come is not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from random import Random
from typing import TYPE_CHECKING

from pytest_llmserve.errors import LoadError

if TYPE_CHECKING:
    from pytest_llmserve.servers import Server


def prompts(count: int, tokens: int) -> list[str]:
    """`count` different texts of common words, the same ones every time, of roughly `tokens` tokens
    each: no more with tokenizers that need up to two for a word."""
    from pytest_llmserve.load.tokens import WORDS

    words = max(1, tokens // 2)
    return [" ".join(Random(number).choices(WORDS, k=words)) for number in range(count)]


def greedy(
    server: Server, prompts: Sequence[str], output_tokens: int, *, at_once: int = 1
) -> list[str]:
    """The texts that complete these prompts at temperature 0, in their order, each of
    `output_tokens` tokens; up to `at_once` are asked for at the same time.

    Raises LoadError if one is not answered, or not in full length.
    """
    from pytest_llmserve.engines import get_engine
    from pytest_llmserve.load.ask import post

    fixed = get_engine(server.engine).body

    def one(prompt: str) -> str:
        body = {
            "model": server.model, "prompt": prompt, "max_tokens": output_tokens,
            "temperature": 0, **fixed,
        }  # fmt: skip
        try:
            reply = post(server, "/v1/completions", body, timeout=600.0)
        except OSError as error:
            raise LoadError(f"A request for an answer to compare failed: {error}.") from None
        usage = reply.json.get("usage") if isinstance(reply.json, dict) else None
        made = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if reply.status != 200 or made not in (None, output_tokens):
            what = reply.body[:200].decode(errors="replace")
            raise LoadError(
                f"An answer to compare should have {output_tokens} tokens, has {made} "
                f"(HTTP status {reply.status}: {what})."
            )
        return reply.text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, prompts))


def agreement(expected: Sequence[str], given: Sequence[str]) -> float:
    """How far answers agree, 0 to 1: the mean share of their text up to the first difference.

    1 means that all are identical. Engines whose arithmetic depends on what else is in the batch
    may leave a common path somewhere without being wrong; a wrong answer is so from its beginning.
    """
    if len(expected) != len(given) or not expected:
        raise ValueError(f"{len(expected)} answers cannot be compared with {len(given)}")
    shares = []
    for one, other in zip(expected, given, strict=True):
        longest = max(len(one), len(other))
        pairs = zip(one, other, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        shares.append(same / longest if longest else 1.0)
    return sum(shares) / len(shares)
