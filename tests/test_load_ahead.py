"""A request whose time is known lies in the kernel before it, and leaves when the time has come."""

from __future__ import annotations

import socket
import time

import pytest
from wire_server import DONE, HEAD, LAST, chunk, text

from pytest_llmserve.load import client as client_module
from pytest_llmserve.load.client import Client, Connection, Exchange

ANSWER = HEAD + chunk(text() + DONE) + LAST
SMALL = b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody"

pytestmark = pytest.mark.skipif(
    client_module._CORK is None, reason="TCP_CORK is Linux's, and so is holding requests back"
)


class Pair:
    """A client with one connection that is open, and the server's end of it."""

    def __init__(self, request=SMALL):
        self.ended = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.client = Client(
            f"http://127.0.0.1:{port}",
            timeout=5.0,
            stream=True,
            prepare=lambda exchange: setattr(exchange, "request", request),
            on_end=self.ended.append,
        )
        self.client.connect_ahead(1)
        self.far, _ = self.listener.accept()
        self.far.settimeout(5.0)
        self.client.run(lambda: not self.client._pool)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.far.close()
        self.listener.close()

    def schedule(self, ahead):
        exchange = Exchange(1, -1, 0)
        exchange.intended = time.monotonic() + ahead
        self.client.schedule(exchange)
        return exchange

    def heard(self):
        """What has come to the server by now."""
        self.far.setblocking(False)
        try:
            return self.far.recv(1 << 20)
        except BlockingIOError:
            return None
        finally:
            self.far.settimeout(5.0)


@pytest.fixture
def held(monkeypatch):
    """Whether each connection held a request back when it was released."""
    seen = []
    release = Connection.release

    def spy(conn):
        seen.append(conn.loaded)
        release(conn)

    monkeypatch.setattr(Connection, "release", spy)
    return seen


def test_it_is_held_back_until_its_time(held):
    with Pair() as pair:
        exchange = pair.schedule(0.04)
        assert exchange.conn.loaded
        time.sleep(0.02)
        assert pair.heard() is None
        pair.client.run(lambda: not exchange.launched)
        assert pair.far.recv(1 << 20) == SMALL
        assert 0 <= exchange.sent - exchange.intended < 1
        pair.far.sendall(ANSWER)
        pair.client.run(lambda: not pair.ended)
        pair.client.decode()
    assert held == [True]
    assert exchange.answer.error == 0
    assert exchange.connect > 0


def test_the_next_one_on_the_connection_is_sent_without_waiting(held):
    with Pair() as pair:
        for number in range(2):
            exchange = pair.schedule(0.02 if number == 0 else 0.0)
            pair.client.run(lambda now=exchange: not now.launched)
            assert pair.far.recv(1 << 20) == SMALL
            pair.far.sendall(ANSWER)
            pair.client.run(lambda want=number: len(pair.ended) <= want)
    assert held == [True]
    assert exchange.connect == 0


def test_what_does_not_fit_one_segment_is_sent_at_its_time(held):
    long = b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
    with Pair(long) as pair:
        exchange = pair.schedule(0.03)
        assert not exchange.conn.loaded
        time.sleep(0.01)
        assert pair.heard() is None
        pair.client.run(lambda: not exchange.launched)
        got = b""
        while len(got) < len(long):
            got += pair.far.recv(1 << 20)
        assert got == long
    assert held == []


def test_a_request_that_is_given_up_before_its_time_never_reaches_the_server():
    with Pair() as pair:
        exchange = pair.schedule(0.04)
        assert exchange.conn.loaded
        pair.client.stopped = True
        pair.client.cancel()
        pair.client.close()
        with pytest.raises(ConnectionResetError):
            assert pair.far.recv(1 << 20) == b""  # neither the request nor an orderly end
    assert not exchange.launched


def test_a_connection_that_breaks_meanwhile_is_replaced():
    with Pair() as pair:
        exchange = pair.schedule(0.04)
        pair.far.close()
        pair.client.run(lambda: not exchange.launched)
        pair.far, _ = pair.listener.accept()
        pair.client.run(lambda: exchange.sent != exchange.sent)
        assert pair.far.recv(1 << 20) == SMALL
        pair.far.sendall(ANSWER)
        pair.client.run(lambda: not pair.ended)
        pair.client.decode()
    assert exchange.answer.error == 0


def test_of_what_is_due_at_one_time_requests_come_first():
    order = []
    with Pair() as pair:
        when = time.monotonic() + 0.01
        pair.client.at(when, lambda: order.append("report"))
        pair.client.at(when, lambda: order.append("request"), first=True)
        pair.client.run(lambda: len(order) < 2)
    assert order == ["request", "report"]
