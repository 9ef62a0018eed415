"""Foreign text made fit to show: no secrets, no control characters, no endless lines.

Model names, server logs, file names and test ids come from anywhere. This is the one gate they
pass before any report; escaping for the medium (HTML, Markdown) comes after it.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: Longer text is cut, with an ellipsis.
LONGEST = 600
HIDDEN = "(hidden)"

# C0 but for tab and line breaks, DEL and C1, direction marks, invisible joiners, lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_SECRET_NAME = (
    r"[\w.-]*(?:api[-_]?key|access[-_]?key|token|secret|passw(?:or)?d|credentials?|authorization)"
)
_KEY_PREFIX = "sk|hf|gh[pos]|github_pat|glpat|nvapi|xox[abp]|AKIA"
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#@]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {HIDDEN}"),
    (re.compile(rf"\b(?:{_KEY_PREFIX})[-_A-Za-z0-9]{{12,}}"), HIDDEN),
    (re.compile(rf"(?i)(--{_SECRET_NAME})([=\s]\s*)(?:'[^']*'|\"[^\"]*\"|\S+)"), rf"\1\2{HIDDEN}"),
    (
        re.compile(rf"(?i)\b({_SECRET_NAME}[\"']?\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,;&'\"]+)"),
        rf"\1{HIDDEN}",
    ),
)  # fmt: skip
_SECRET_FIELD = re.compile(rf"(?i)^(?:{_SECRET_NAME}|.*[-_.]key)$")


def visible(text: str) -> str:
    """Text with all that cannot be seen, such as a terminal's control codes, shown as U+FFFD."""
    return _UNSEEN.sub("\ufffd", text)


def clean(text: object, longest: int = LONGEST) -> str:
    """Text in one line without secrets; what cannot be seen shows as U+FFFD."""
    found = str(text)[: 4 * longest]
    found = " ".join(visible(found).split())
    for pattern, instead in _SECRETS:
        found = pattern.sub(instead, found)
    return found if len(found) <= longest else found[: longest - 1] + "…"


def clean_value(name: str, value: Any) -> str:
    """The value of a named field; hidden if the name says that it is a secret, "–" for None."""
    if value is None:
        return "–"
    if _SECRET_FIELD.match(name):
        return HIDDEN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        return clean(json.dumps(value, sort_keys=True))
    return clean(value)
