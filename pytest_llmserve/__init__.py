"""A pytest plugin that serves language models, puts them under load and gives a verdict.

from pytest_llmserve import at_least, at_most, closed_loop

@pytest.mark.llmserve(server="qwen3-8b-nvfp4")
def test_thirty_users(llm_server, load, slo, baseline):
    run = load(closed_loop(users=30), duration=60)
    slo.check(run, at_least("output_throughput", 1000), at_most("ttft.p95", 0.5))
    baseline.check(run)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmserve.load.ask import post
    from pytest_llmserve.load.plan import Lengths, closed_loop, open_loop, trace
    from pytest_llmserve.search import most_users
    from pytest_llmserve.verdict.slo import at_least, at_most

__all__ = [
    "Lengths",
    "at_least",
    "at_most",
    "closed_loop",
    "most_users",
    "open_loop",
    "post",
    "trace",
]


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): pytest imports this package in every run of every user.
    if name in ("Lengths", "closed_loop", "open_loop", "trace"):
        from pytest_llmserve.load import plan

        return getattr(plan, name)
    if name == "post":
        from pytest_llmserve.load.ask import post

        return post
    if name == "most_users":
        from pytest_llmserve.search import most_users

        return most_users
    if name in ("at_least", "at_most"):
        from pytest_llmserve.verdict import slo

        return getattr(slo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
