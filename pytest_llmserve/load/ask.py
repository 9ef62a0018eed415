"""One plain HTTP request beside the load: never through a proxy, never following a redirect."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmserve.servers import Server


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
_CAP = 64 << 20


def ask(url: str, headers: Mapping[str, str], body: Any = None, timeout: float = 30.0) -> bytes:
    """The body of the answer to a GET, or to a POST of `body` as JSON.

    Raises OSError when there is none: no connection, a status other than 200, a broken answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=dict(headers))
    if data is not None:
        request.add_header("Content-Type", "application/json")
    try:
        with _opener.open(request, timeout=timeout) as answer:
            if answer.status != 200:
                raise OSError(f"{url} answered {answer.status}")
            return bytes(answer.read(_CAP))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url}: {error}") from None


def ask_json(url: str, headers: Mapping[str, str], body: Any = None, timeout: float = 30.0) -> Any:
    """Like `ask`, decoded; None where there is no such answer or it is not JSON."""
    try:
        return json.loads(ask(url, headers, body, timeout))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Reply:
    """A server's answer to one request: its HTTP status and its body."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body decoded; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """The text of a completion, or of a chat's answer; "" if it is neither."""
        match self.json:
            case {"choices": [{"text": str(text)}, *_]}:
                return text
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return text
        return ""


def post(server: Server, path: str, body: Any, timeout: float = 60.0) -> Reply:
    """POST `body` (as JSON; bytes as they are) to a path such as `/v1/completions`, whatever the
    answer's status is.

    For what an answer says, not for how fast it comes. Raises OSError if there is no answer, or a
    broken one.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.endpoint}{path}", data=data)
    request.add_header("Content-Type", "application/json")
    if server.api_key:
        request.add_header("Authorization", f"Bearer {server.api_key}")
    try:
        with _opener.open(request, timeout=timeout) as answer:
            return Reply(answer.status, answer.read(_CAP))
    except urllib.error.HTTPError as refusal:
        return Reply(refusal.code, refusal.read(_CAP))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{request.full_url}: {error}") from None
