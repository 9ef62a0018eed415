"""Values of a config's `args` as words of a command line, the same way for all engines."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any


def option_words(
    args: Mapping[str, Any],
    *,
    negations: bool = True,
    json_lists: Collection[str] = (),
    repeated: Collection[str] = (),
) -> list[str]:
    """The words for `args`, names verbatim (`max-num-seqs`, `max_num_seqs` or `-np`).

    True gives the bare flag, False its `--no-` form (`negations` false: nothing, for engines
    whose flags have no such form), None nothing, so that a config can unset what another set. A
    mapping gives JSON in one word; a list one word for each item after one flag, unless its name
    is among `json_lists` (one JSON word) or `repeated` (the flag again for each item).
    """
    words: list[str] = []
    for name, value in args.items():
        bare = name.lstrip("-").replace("_", "-")
        flag = name if name.startswith("-") else f"--{name}"
        match value:
            case None:
                continue
            case True:
                words.append(flag)
            case False:
                words += [f"--no-{bare}"] if negations else []
            case list() | tuple() if bare in json_lists:
                words += [flag, word(list(value))]
            case list() | tuple() if bare in repeated:
                for item in value:
                    words += [flag, word(item)]
            case list() | tuple():
                words += [flag, *map(word, value)]
            case _:
                words += [flag, word(value)]
    return words


def word(value: Any) -> str:
    """One value as one word: text as it is, everything else as JSON (no locale, no quotes)."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = dict(value)
    return json.dumps(value, separators=(",", ":"))


def value_of(args: Mapping[str, Any], option: str) -> Any:
    """The value of an option (`max-num-seqs`) in whichever spelling the user wrote; or None."""
    for name, value in args.items():
        if name.lstrip("-").replace("_", "-") == option:
            return value
    return None


def given(args: Mapping[str, Any], *names: str) -> bool:
    """Whether the user set one of these options."""
    return any(value_of(args, name) is not None for name in names)
