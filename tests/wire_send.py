"""Requests through the client's transport, in the process of the test."""

from __future__ import annotations

import time

from pytest_llmserve.load.assemble import arrays
from pytest_llmserve.load.client import Client, Exchange
from pytest_llmserve.load.plan import LoadPlan, Target, Workload, closed_loop
from pytest_llmserve.load.record import ERRORS
from pytest_llmserve.load.requests import Requests
from pytest_llmserve.load.tokens import Prompts


def send(
    url,
    count=1,
    *,
    want=3,
    timeout=5.0,
    stream=True,
    at_once=False,
    headers=None,
    gap=0.0,
    model="m",
    api="completions",
):
    """Send `count` requests, one after the other or at once; the columns and the connections."""
    plan = LoadPlan(closed_loop(1), Workload(8, want, stream=stream, api=api))
    target = Target(url, model, headers or {}, {"ignore_eos": True}, tuple(range(200)))
    maker = Requests(target, plan, Prompts(ids=target.token_ids if api == "completions" else ()))
    left = [Exchange(1, -1, number) for number in range(count)]
    running = 0

    def prepare(exchange):
        made = maker.make(exchange.phase, exchange.user, exchange.number)
        exchange.request, exchange.want_prompt, exchange.want_output = made

    def following():
        nonlocal running
        exchange = left.pop(0)
        exchange.intended = time.monotonic() + gap
        running += 1
        client.schedule(exchange)

    def ended(exchange):
        nonlocal running
        running -= 1
        if left and not at_once:
            following()

    client = Client(url, timeout=timeout, stream=stream, prepare=prepare, on_end=ended)
    for _ in range(count if at_once else 1):
        following()
    client.run(lambda: running > 0)
    client.decode()
    columns = arrays(client.exchanges, client.clock)
    client.close()
    return columns


def errors(columns):
    return [ERRORS[code] for code in columns["error"]]
