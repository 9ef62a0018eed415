"""The transport against real sockets: well-behaved servers, slow ones and hostile ones."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import time

import pytest
from wire_send import errors, send
from wire_server import DONE, HEAD, LAST, WireServer, chunk, event, steady, text, usage

from pytest_llmserve.errors import LoadError
from pytest_llmserve.load import client as client_module
from pytest_llmserve.load.assemble import timestamps
from pytest_llmserve.load.client import Client


def test_requests_one_after_another_share_a_connection():
    with WireServer(steady(0.01, 0.002)) as server:
        columns = send(server.url, 4)
    assert errors(columns) == ["none"] * 4
    assert server.connections == 1
    assert list(columns["output_tokens"]) == [3] * 4
    assert list(columns["prompt_tokens"]) == [8] * 4
    assert list(columns["events"]) == [3] * 4
    assert list(columns["event_tokens"]) == [1.0] * 12
    assert columns["connect"][0] > 0
    assert not columns["connect"][1:].any()
    for earlier, later in (("intended", "sent"), ("sent", "first"), ("first", "last")):
        assert (columns[earlier] <= columns[later]).all()
    assert (columns["last"] <= columns["end"]).all()
    assert (columns["first"] - columns["sent"] >= 0.01).all()


@pytest.mark.skipif(sys.platform != "linux", reason="SO_TIMESTAMPNS is Linux's")
def test_the_kernel_gives_the_times():
    with WireServer(steady(0.01, 0.002)) as server:
        columns = send(server.url, 3)
    assert timestamps(columns["event_lag"]) == "kernel"
    assert (columns["event_lag"] >= 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="SO_TIMESTAMPNS is Linux's")
def test_a_client_that_sleeps_does_not_lengthen_what_it_reports(monkeypatch):
    read = Client._read

    def late(self, conn):
        time.sleep(0.1)
        read(self, conn)

    monkeypatch.setattr(Client, "_read", late)
    with WireServer(steady(0.2, 0.0)) as server:
        columns = send(server.url, want=1)
    # The token came while the client slept, and is reported without that sleep.
    assert columns["event_lag"][0] > 0.05


def test_many_at_once_get_a_connection_each():
    with WireServer(steady(0.2, 0.002)) as server:
        columns = send(server.url, 20, at_once=True, gap=0.06)
    assert errors(columns) == ["none"] * 20
    assert server.connections == 20


def test_bytes_one_at_a_time():
    def answer(conn, request):
        whole = HEAD + chunk(text()) + chunk(text()) + chunk(usage(8, 2)) + chunk(DONE) + LAST
        for i in range(len(whole)):
            conn.sendall(whole[i : i + 1])
        return b""

    with WireServer(answer) as server:
        columns = send(server.url, 2, want=2)
    assert errors(columns) == ["none"] * 2
    assert list(columns["events"]) == [2, 2]


def test_what_came_in_one_read_is_marked():
    def answer(conn, request):
        return HEAD + b"".join(map(chunk, [text(), text(), text(), usage(8, 3), DONE])) + LAST

    with WireServer(answer) as server:
        columns = send(server.url)
    assert list(columns["event_coalesced"]) == [False, True, True]


def test_tokens_of_events_that_tell_and_of_those_that_do_not():
    def told(conn, request):
        events = [text(usage={"prompt_tokens": 8, "completion_tokens": n}) for n in (1, 3, 6)]
        return HEAD + b"".join(map(chunk, [*events, DONE])) + LAST

    def shared(conn, request):
        return HEAD + b"".join(map(chunk, [text(), text(), usage(8, 6), DONE])) + LAST

    def silent(conn, request):
        return HEAD + b"".join(map(chunk, [text(), text(), DONE])) + LAST

    for answer, tokens, total in ((told, [1, 2, 3], 6), (shared, [3, 3], 6), (silent, [1, 1], -1)):
        with WireServer(answer) as server:
            columns = send(server.url, want=6)
        assert list(columns["event_tokens"]) == tokens
        assert list(columns["output_tokens"]) == [total]
        assert errors(columns) == ["none"]


def test_one_whole_answer():
    body = b'{"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 8, "completion_tokens": 3}}'

    def answer(conn, request):
        assert request[1]["stream"] is False
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    with WireServer(answer) as server:
        columns = send(server.url, 2, stream=False)
    assert errors(columns) == ["none"] * 2
    assert list(columns["event_tokens"]) == [3, 3]
    assert server.connections == 1


def test_a_server_that_closes_after_each_answer():
    def answer(conn, request):
        head = HEAD.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
        conn.sendall(head + chunk(text()) + chunk(usage(8, 1)) + chunk(DONE) + LAST)

    with WireServer(answer) as server:
        columns = send(server.url, 3, want=1)
    assert errors(columns) == ["none"] * 3
    assert server.connections == 3


def test_a_kept_connection_that_the_server_dropped_is_no_error():
    def answer(conn, request):
        conn.sendall(HEAD + chunk(text()) + chunk(usage(8, 1)) + chunk(DONE) + LAST)
        conn.shutdown(socket.SHUT_RDWR)

    with WireServer(answer) as server:
        columns = send(server.url, 5, want=1)
    assert errors(columns) == ["none"] * 5


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    columns = send(f"http://127.0.0.1:{port}", 2)
    assert errors(columns) == ["refused"] * 2
    assert list(columns["status"]) == [0, 0]


def test_a_host_that_does_not_exist():
    with pytest.raises(LoadError, match="cannot be resolved"):
        send("http://no-such-host.invalid:8000")


def test_ipv6_and_a_name_with_several_addresses():
    with WireServer(steady(0.0, 0.0)) as server:
        columns = send(f"http://localhost:{server.port}")
    assert errors(columns) == ["none"]


def endless_headers(conn, request):
    conn.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        conn.sendall(b"X-More: and more\r\n" * 64)


def gigabyte_line(conn, request):
    conn.sendall(HEAD + b"%x\r\ndata: " % (1 << 30))
    while True:
        conn.sendall(b"x" * (1 << 16))


def wrong_chunk_sizes(conn, request):
    return HEAD + b"5\r\n" + text() + b"\r\n" + LAST


def never_ends(conn, request):
    conn.sendall(HEAD)
    while True:
        conn.sendall(chunk(text()))
        time.sleep(0.02)


def says_nothing(conn, request):
    time.sleep(30)


def hangs_up(conn, request):
    conn.sendall(HEAD + chunk(text()))


def hangs_up_at_once(conn, request):
    return None


def resets(conn, request):
    conn.sendall(HEAD + chunk(text()))
    time.sleep(0.1)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    conn.close()


def redirects(conn, request):
    return b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"


def not_http(conn, request):
    return b"SSH-2.0-OpenSSH_9.0\r\n"


def broken_stream(conn, request):
    failure = event({"error": {"message": "out of memory", "code": 500}})
    return HEAD + chunk(text()) + chunk(failure) + chunk(DONE) + LAST


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (endless_headers, "malformed"),
        (gigabyte_line, "malformed"),
        (wrong_chunk_sizes, "malformed"),
        (never_ends, "timeout"),
        (says_nothing, "timeout"),
        (hangs_up, "truncated"),
        (hangs_up_at_once, "reset"),
        (resets, "reset"),
        (redirects, "http_status"),
        (not_http, "malformed"),
        (broken_stream, "http_status"),
    ],
)
def test_hostile_servers_end_in_a_classified_error(answer, error, monkeypatch):
    monkeypatch.setattr(client_module, "BODY_CAP", 4 << 20)
    with WireServer(answer) as server:
        columns = send(server.url, timeout=0.5 if error == "timeout" else 20.0)
    assert errors(columns) == [error]


def test_a_second_answer_that_nobody_asked_for_ends_the_connection():
    def answer(conn, request):
        whole = HEAD + chunk(text()) + chunk(usage(8, 1)) + chunk(DONE) + LAST
        return whole + whole

    with WireServer(answer) as server:
        columns = send(server.url, 2, want=1)
    assert errors(columns) == ["none"] * 2
    assert server.connections == 2
    assert list(columns["events"]) == [1, 1]


def test_memory_is_bounded_by_decoding_on_the_way(monkeypatch):
    monkeypatch.setattr(client_module, "RAW_CAP", 1000)
    with WireServer(steady(0.0, 0.0)) as server:
        columns = send(server.url, 20, want=5)
    assert errors(columns) == ["none"] * 20
    assert list(columns["events"]) == [5] * 20


def test_headers_go_out_and_proxies_are_ignored(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with WireServer(steady(0.0, 0.0)) as server:
        columns = send(server.url, headers={"Authorization": "Bearer secret"})
    assert errors(columns) == ["none"]
    assert b"Authorization: Bearer secret\r\n" in server.requests[0][1]
    with pytest.raises(LoadError, match="line break"):
        send("http://127.0.0.1:9", headers={"X": "a\r\nb"})


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    path = tmp_path / "server.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", path, "-out", tmp_path / "certificate.pem"),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + (tmp_path / "certificate.pem").read_bytes())
    return path


def test_tls(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    plain = steady(0.01, 0.002)
    with WireServer(plain, tls=context) as server:
        url = f"https://localhost:{server.port}"
        assert errors(send(url)) == ["refused"]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        columns = send(url, 3)
    assert errors(columns) == ["none"] * 3
    assert list(columns["events"]) == [3] * 3
    assert timestamps(columns["event_lag"]) == "user"
