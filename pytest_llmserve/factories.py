"""More servers for one test module or conftest, in the manner of pytest-postgresql's factories.

# conftest.py
from pytest_llmserve import factories

tiny = factories.llm_server(server="vllm-tiny-cpu")
serial = factories.llm_server(server="vllm-tiny-cpu", args={"max-num-seqs": 1})
load_tiny = factories.load("tiny")

# test_tiny.py
def test_tiny(load_tiny, slo):
    slo.check(load_tiny(closed_loop(users=30)), at_most("ttft.p95", 1.0))
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmserve.fixtures import Load, machine, make_load, serve
from pytest_llmserve.resolve import check_arguments

if TYPE_CHECKING:
    from pytest_llmserve.servers import Server


def llm_server(**arguments: Any) -> Callable[..., Any]:
    """A fixture that gives a running `Server`, started once per effective config.

    Takes the arguments of `@pytest.mark.llmserve`: `server` (a config's name or file) or `engine`,
    and `model`, `args`, `env`, `gpus`, `hardware`, `ready_timeout` (seconds), `emulation`, which
    replace the config's (`args` and `env` are merged into them). Options such as
    `--llmserve-endpoint` and `--llmserve-engine` apply as they do to the marker.

    Raises ConfigError at once for arguments that cannot be right.
    """
    where = "factories.llm_server"
    check_arguments(where, arguments)

    @pytest.fixture
    def server(request: pytest.FixtureRequest) -> Generator[Server, None, None]:
        with machine(request):
            yield serve(request, arguments, where)

    return server


def load(server: str) -> Callable[..., Any]:
    """A `load` fixture that drives load against the server fixture of this name."""

    @pytest.fixture
    def load_fixture(request: pytest.FixtureRequest) -> Load:
        return make_load(request, request.getfixturevalue(server))

    return load_fixture
