"""A server made of scripted bytes on real sockets, for what no well-behaved server does."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {text}\n\n".encode()


def text(word="x", **more) -> bytes:
    return event({"choices": [{"text": word, "index": 0}], **more})


def delta(**fields) -> bytes:
    return event({"choices": [{"delta": fields, "index": 0}]})


def usage(prompt, output, **more) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, **more}
    return event({"choices": [], "usage": counts})


DONE = event("[DONE]")
LAST = b"0\r\n\r\n"


class WireServer:
    """Accepts connections; `answer(conn, request)` is called for each request on each of them.

    `request` is (head, decoded JSON body). It may return bytes to send and `None` to hang up.
    """

    def __init__(self, answer, tls=None):
        self._answer, self._tls = answer, tls
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests = []
        self.connections = 0
        self._open = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                conn, _ = self._socket.accept()
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                self._open.add(conn)
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn):
        if self._tls is not None:
            try:
                conn = self._tls.wrap_socket(conn, server_side=True)
            except OSError:
                return
        with contextlib.suppress(OSError), conn, conn.makefile("rb") as file:
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = file.readline()
                    if not line:
                        return
                    head += line
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = json.loads(file.read(length)) if length else None
                self.requests.append((time.monotonic(), head, body))
                answer = self._answer(conn, (head, body))
                if answer is None:
                    return
                conn.sendall(answer)
        self._open.discard(conn)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()
        for conn in list(self._open):
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)


def steady(first=0.05, gap=0.01, words=1):
    """An answer function that streams as many tokens as were asked for."""

    def answer(conn, request):
        body = request[1]
        count = body["max_tokens"]
        prompt = body.get("prompt", "")
        size = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        time.sleep(first)
        conn.sendall(HEAD)
        for _ in range(0, count, words):
            conn.sendall(chunk(text()))
            time.sleep(gap)
        return chunk(usage(size, count)) + chunk(DONE) + LAST

    return answer
