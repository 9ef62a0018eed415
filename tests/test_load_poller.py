from __future__ import annotations

import os
import select
import time

import pytest

from pytest_llmserve.poller import READ, Poller


@pytest.fixture(params=["epoll", "poll"])
def poller(request, monkeypatch):
    if request.param == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    poller = Poller()
    yield poller
    poller.close()


def test_never_returns_before_its_deadline_without_a_reason(poller):
    for wait in (0.0, 1e-5, 3e-4, 2.3e-3):
        deadline = time.monotonic() + wait
        assert poller.poll(deadline) == []
        assert time.monotonic() >= deadline


def test_says_what_is_ready_at_once(poller):
    end, other = os.pipe()
    poller.register(end, READ)
    os.write(other, b"x")
    assert poller.poll(time.monotonic() + 60) == [(end, READ)]
    assert poller.poll(None) == [(end, READ)]
    poller.modify(end, 0)
    assert poller.poll(time.monotonic()) == []
    poller.unregister(end)
    poller.unregister(end)
    os.close(end)
    os.close(other)


@pytest.mark.parametrize("most", [60e-6, 300e-6])
def test_learns_how_late_this_machine_wakes_up(most):
    poller = Poller(most)
    for _ in range(100):
        poller.poll(time.monotonic() + 5e-4)
    assert 60e-6 <= poller._spin <= most
    before = poller.spun
    poller.poll(time.monotonic() + 1e-3, exact=False)
    assert poller.spun == before
    poller.close()


def test_an_inexact_wait_ends_no_earlier(poller):
    for wait in (0.0, 3e-4, 2.3e-3):
        deadline = time.monotonic() + wait
        assert poller.poll(deadline, exact=False) == []
        assert time.monotonic() >= deadline - 1e-5
