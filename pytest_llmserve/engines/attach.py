"""A server that runs already, at `endpoint`: any OpenAI-compatible one.

Nothing is started. Which engine answers is found out by `launch.attach`, and the `Server` then
carries that engine's name; this one stands for servers that tell nothing about themselves.
"""

from __future__ import annotations

from pytest_llmserve.engines import Engine, version_at

ENGINE = Engine(
    name="attach",
    health="/health",
    body={"ignore_eos": True},
    token_prompts=False,
    counters={},
    version=version_at("/version"),
    needs_gpu=False,
)
