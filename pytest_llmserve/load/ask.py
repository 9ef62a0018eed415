"""One plain HTTP request beside the load: never through a proxy, never following a redirect."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


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
