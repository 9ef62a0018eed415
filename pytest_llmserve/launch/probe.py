"""Small questions to a server: is it healthy, what does it say about itself?

Not for load. No proxies, no redirects, short time-outs.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pytest_llmserve.engines import Fetch


@dataclass(frozen=True)
class Answer:
    """`status` 0: there was none, and `problem` says why."""

    status: int
    text: str = ""
    problem: str = ""

    def json(self) -> Any:
        """The decoded body; None unless it is JSON with status 200."""
        if self.status != 200:
            return None
        try:
            return json.loads(self.text)
        except ValueError:
            return None


def ask(endpoint: str, path: str, api_key: str | None = None, timeout: float = 5.0) -> Answer:
    """GET `path` of the server at `endpoint`, in at most `timeout` seconds a step."""
    url = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(url.hostname or "", url.port, timeout=timeout)
    except (ValueError, http.client.InvalidURL) as error:
        return Answer(0, problem=f"is not a URL ({error})")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        connection.request("GET", url.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, response.read().decode("utf-8", "replace"))
    except ConnectionRefusedError:
        return Answer(0, problem="refuses connections")
    except TimeoutError:
        return Answer(0, problem=f"did not answer within {timeout:g} s")
    except http.client.HTTPException as error:
        return Answer(0, problem=f"does not speak HTTP ({type(error).__name__})")
    except OSError as error:
        return Answer(0, problem=f"cannot be reached ({error.strerror or error})")
    finally:
        connection.close()


def listening(endpoint: str, timeout: float = 5.0) -> bool:
    """Whether something takes connections there: a look that costs a busy server nothing."""
    url = urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname or "", port), timeout):
            return True
    except OSError:
        return False


def fetcher(endpoint: str, api_key: str | None) -> Fetch:
    """What engines use to question a running server."""
    return lambda path: ask(endpoint, path, api_key).json()


def served_models(answer: Any) -> list[str]:
    """The names in an answer of /v1/models."""
    data = answer.get("data") if isinstance(answer, Mapping) else None
    rows = data if isinstance(data, list) else []
    return [str(row["id"]) for row in rows if isinstance(row, Mapping) and "id" in row]
