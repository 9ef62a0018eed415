"""Prompts of exact length: token ids the server knows, or text whose length it has confirmed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmserve.load.ask import ask_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmserve.load.plan import Target, Workload

# Common short English words: most tokenizers have each, with the space before it, as one token.
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "these two may then do first any my now such like our over man me even most made after also "
    "did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get "
    "here between both life being under never day same another know while last might us great old "
    "year off come since against go came right used take three"
)
#: The words that prompts made of text are drawn from.
WORDS = tuple(_WORDS.split())
#: A pool of fewer ids would make prompts repeat.
LEAST_IDS = 100


@dataclass(frozen=True)
class Prompts:
    """How to make a prompt of n tokens.

    From `ids`, n of them; or, if there are none, as text of `(n - overhead) / per_word` words
    (`overhead`: what the server adds to every prompt, such as a chat template).
    """

    ids: tuple[int, ...] = ()
    overhead: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int) -> int:
        """How many words make a prompt of `tokens` tokens; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


def token_pool(url: str, headers: Mapping[str, str], model: str) -> tuple[int, ...]:
    """Ids of ordinary text, at least `LEAST_IDS` of them and none special, sorted.

    Asks `/tokenize` (vLLM's and llama.cpp's form); empty where there is no such endpoint.
    """
    text = " ".join(WORDS)
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False}
    answer = ask_json(f"{url}/tokenize", headers, body)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        return ()
    pool = sorted(set(tokens))
    return tuple(pool) if len(pool) >= LEAST_IDS else ()


def prepare(target: Target, workload: Workload) -> Prompts:
    """How to make this workload's prompts for this server.

    Asks the server how many tokens some texts have, unless ids do: with `/tokenize` or, where
    that is missing, by two requests for one token each, which the server's counters will show;
    call it before reading those. A server that says neither gets one word a token.
    """
    if target.token_ids and workload.api == "completions":
        return Prompts(ids=target.token_ids)
    most = max(8, workload.longest_prompt)
    few, many = max(4, most // 2), most
    counts = []
    for words in (few, many):
        text = " ".join(random.Random(words).choices(WORDS, k=words))
        count = _count(target, workload.api, text)
        if count is None:
            return Prompts()
        counts.append(count)
    per_word = (counts[1] - counts[0]) / (many - few)
    if per_word <= 0:
        return Prompts()
    return Prompts(overhead=counts[1] - per_word * many, per_word=per_word)


def _count(target: Target, api: str, text: str) -> int | None:
    """Tokens of a prompt of this text as the server counts them."""
    content: dict[str, Any] = (
        {"messages": [{"role": "user", "content": text}]} if api == "chat" else {"prompt": text}
    )
    answer = ask_json(f"{target.url}/tokenize", target.headers, {"model": target.model, **content})
    count = answer.get("count") if isinstance(answer, dict) else None
    if not isinstance(count, int):
        path = "chat/completions" if api == "chat" else "completions"
        body = {**target.body, "model": target.model, **content, "max_tokens": 1, "stream": False}
        answer = ask_json(f"{target.url}/v1/{path}", target.headers, body, timeout=120.0)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None
