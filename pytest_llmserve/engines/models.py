"""Model names as people write them."""

from __future__ import annotations

import math
import re

# The dense sizes of Qwen3, in billions of parameters (huggingface.co/Qwen, collection Qwen3).
_QWEN3 = (0.6, 1.7, 4.0, 8.0, 14.0, 32.0)
_NAME = re.compile(
    r"(?P<org>[A-Za-z0-9][\w.-]*/)?"
    r"qwen[-_ ]?3[-_ ]*(?P<size>\d+(?:\.\d+)?)[-_ ]?b(?P<rest>(?:[-_ ].*)?)",
    re.IGNORECASE,
)


def normalise_model(name: str) -> tuple[str, str | None]:
    """A model's name as its publisher spells it, and a sentence to show if that changed its size.

    "Qwen3 7B" gives ("Qwen3-8B", "There is no Qwen3 7B; taken as Qwen3-8B."). The publisher and
    the rest ("-NVFP4") stay. Paths and other families come back as they are.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None or "-a" in match["rest"].lower()[:2]:  # mixtures: Qwen3-30B-A3B
        return name, None
    asked = float(match["size"])
    if asked <= 0:
        return name, None
    real = min(_QWEN3, key=lambda size: abs(math.log(size / asked)))
    spelled = f"Qwen3-{real:g}B{match['rest'].replace(' ', '-').replace('_', '-')}"
    notice = None if real == asked else f"There is no Qwen3 {asked:g}B; taken as {spelled}."
    return f"{match['org'] or ''}{spelled}", notice


def hub_name(name: str) -> str:
    """The name under which a hub has the model: a bare "Qwen3-8B" is Qwen's own.

    Paths, and names that have their publisher already, come back as they are.
    """
    spelled, _ = normalise_model(name)
    return f"Qwen/{spelled}" if spelled.startswith("Qwen3-") and "/" not in spelled else spelled
