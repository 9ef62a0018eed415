"""Did this run select all tests below its arguments? Only then is a baseline that no test asked for
one that no test needs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

#: Options that leave tests out, by their names in `config.option`.
_NARROWING = (
    "keyword", "markexpr", "lf", "stepwise", "deselect", "ignore", "ignore_glob", "collectonly",
    "pyargs",
)  # fmt: skip


def narrowed(config: pytest.Config) -> bool:
    """Whether an option or an argument leaves tests of the files given out."""
    return any("::" in argument for argument in config.args) or any(
        getattr(config.option, name, None) for name in _NARROWING
    )


def selected(config: pytest.Config, skipped: Collection[str]) -> Callable[[str], bool]:
    """Whether a test of this name, if there was one, would have run to its end here: it lies in a
    file that the arguments name and neither it nor what holds it was skipped."""
    start = config.invocation_params.dir
    places = [(start / argument).resolve() for argument in config.args]

    def would_run(test: str) -> bool:
        file, *names = test.split("::")
        path = (config.rootpath / file).resolve()
        holders = {"::".join((file, *names[:depth])) for depth in range(len(names) + 1)}
        return bool(file) and any(map(path.is_relative_to, places)) and holders.isdisjoint(skipped)

    return would_run
