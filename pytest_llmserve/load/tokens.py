"""Prompts of exact length: token ids the server knows, or text whose length it has confirmed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load.ask import ask_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
WORDS = tuple(dict.fromkeys(_WORDS.split()))
#: Every text begins with this word, so that what stands before a later one is always a space.
HEAD = "the"
#: A pool of fewer ids would make prompts repeat.
LEAST_IDS = 100

# So many words of one token are variety enough; at most so many questions are asked for them.
_ENOUGH, _MOST_PROBES = 64, 128


@dataclass(frozen=True)
class Prompts:
    """What prompts of an exact number of tokens are made of.

    Either of `ids`; or, if there are none, of a text that begins with `HEAD` and goes on with
    `words`, where each, with the space before it, has as many `tokens` as stand at its place.
    `overhead` is the tokens of a prompt whose text is `HEAD` alone (a chat template and what else
    the server adds, included), `turn` those that an answer and a question of `HEAD` alone add to a
    chat.
    """

    ids: tuple[int, ...] = ()
    words: tuple[str, ...] = WORDS
    tokens: tuple[int, ...] = (1,) * len(WORDS)
    overhead: int = 1
    turn: int = 2

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Prompts:
        """What `as_dict` gave, also after a way through JSON."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()
        }
        return cls(**given)


class Texts:
    """Draws texts, of a known number of tokens each, whose tokens sum to what is asked."""

    def __init__(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        self._of: dict[int, list[str]] = {}
        for text, count in zip(texts, tokens, strict=True):
            self._of.setdefault(count, []).append(text)
        self._sums = [True]  # whether 0, 1, … tokens can be made of these texts

    def draw(self, tokens: int, random: Random) -> list[str]:
        """Texts of `tokens` tokens, or of the next lower number that they can make."""
        tokens = max(0, tokens)
        if list(self._of) == [1]:
            return random.choices(self._of[1], k=tokens)
        while not self._possible(tokens):
            tokens -= 1
        drawn = []
        while tokens:
            fit = [n for n in self._of if n <= tokens and self._possible(tokens - n)]
            count = random.choices(fit, [len(self._of[n]) for n in fit])[0]
            drawn.append(random.choice(self._of[count]))
            tokens -= count
        return drawn

    def _possible(self, tokens: int) -> bool:
        sums = self._sums
        while len(sums) <= tokens:
            sums.append(any(n <= len(sums) and sums[len(sums) - n] for n in self._of))
        return sums[tokens]


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
    that is missing, by requests for one token each, which the server's counters will show; call
    it before reading those. A server that says neither gets one word a token.

    Raises LoadError if the server puts more around every prompt than a prompt shall have.
    """
    if target.token_ids and workload.api == "completions":
        return Prompts(ids=target.token_ids)
    count = _Count(target, workload.api)
    overhead = count(HEAD)
    if overhead is None or workload.dataset is not None:
        return Prompts()
    known = _words(count, overhead)
    ones = {word: 1 for word, tokens in known.items() if tokens == 1}
    known = ones if len(ones) >= _ENOUGH or not known else known
    if not known:
        return Prompts()
    turn = 2
    if workload.turns > 1 and workload.api == "chat":
        turn = (count(HEAD, HEAD, HEAD) or overhead + turn) - overhead
    found = Prompts((), tuple(known), tuple(known.values()), overhead, turn)
    found = _checked(count, found, workload)
    least = workload.prompt_lengths.low if workload.prompt_lengths else workload.prompt_tokens
    if least < found.overhead:
        raise LoadError(
            f"prompts of {least} tokens are too short for {target.url}: what it puts around every "
            f"prompt (such as a chat template) and one word are {found.overhead} tokens; ask for "
            "more prompt_tokens"
        )
    return found


def _words(count: _Count, overhead: int) -> dict[str, int]:
    """Tokens of words, each with the space before it, by testing them in groups.

    Tokenizers split at white space before anything else, so the tokens of words add up: a group
    of n words that has n tokens has words of one token only. Others are halved.
    """
    known: dict[str, int] = {}
    groups: list[Sequence[str]] = [WORDS]
    for _ in range(_MOST_PROBES):
        if not groups or sum(tokens == 1 for tokens in known.values()) >= _ENOUGH:
            break
        group = groups.pop()
        total = count(" ".join((HEAD, *group)))
        tokens = -1 if total is None else total - overhead
        if tokens == len(group):
            known.update(dict.fromkeys(group, 1))
        elif len(group) > 1:
            half = len(group) // 2
            groups += [group[half:], group[:half]]
        elif tokens > 0:
            known[group[0]] = tokens
    return known


def _checked(count: _Count, prompts: Prompts, workload: Workload) -> Prompts:
    """`prompts`, its overhead corrected by what the server says it was given in a request."""
    most = max(workload.longest_prompt, prompts.overhead)
    texts = Texts(prompts.words, prompts.tokens).draw(most - prompts.overhead, Random(most))
    used = count.used(" ".join((HEAD, *texts)))
    if used is None:
        return prompts
    tokens = dict(zip(prompts.words, prompts.tokens, strict=True))
    made = prompts.overhead + sum(tokens[text] for text in texts)
    return replace(prompts, overhead=max(1, prompts.overhead + used - made))


class _Count:
    """Tokens of prompts as the server counts them; None where it does not say."""

    def __init__(self, target: Target, api: str) -> None:
        self._target, self._api = target, api
        self._tokenize: bool | None = None  # whether there is /tokenize; None: not known yet

    def __call__(self, *said: str) -> int | None:
        """Of a prompt: one text or, in a chat, what was said in turns."""
        if self._tokenize is not False:
            body = {"model": self._target.model, **self._content(said)}
            template = self._target.body.get("chat_template_kwargs")
            if template is not None:
                body["chat_template_kwargs"] = template
            answer = ask_json(f"{self._target.url}/tokenize", self._target.headers, body)
            count = answer.get("count") if isinstance(answer, dict) else None
            counted = isinstance(count, int) and count > 0
            if counted or self._tokenize:
                self._tokenize = True
                return count if counted else None
            self._tokenize = False
        return self.used(*said)

    def used(self, *said: str) -> int | None:
        """The same by the usage of a request for one token."""
        target = self._target
        path = "chat/completions" if self._api == "chat" else "completions"
        one = {"max_tokens": 1, "stream": False}
        body = {**target.body, "model": target.model, **self._content(said), **one}
        answer = ask_json(f"{target.url}/v1/{path}", target.headers, body, timeout=120.0)
        usage = answer.get("usage") if isinstance(answer, dict) else None
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) and count > 0 else None

    def _content(self, said: Sequence[str]) -> dict[str, Any]:
        if self._api != "chat":
            return {"prompt": " ".join(said)}
        roles = ("user", "assistant")
        return {
            "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        }
