"""What every request passes before a route sees it: request id, key, rate limit, size and time of its body.

Plain ASGI: a wrapper of Starlette's BaseHTTPMiddleware would put a queue and a task between each chunk and its socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dougong.server.config import ServerConfig
from dougong.server.errors import ApiError, anthropic_body, as_api_error, ollama_body, openai_body
from dougong.server.keys import KeyRing
from dougong.server.limits import RateLimits, current_allowance

__all__ = ["BelowRoot", "Guard", "body_for", "path_of", "respond"]

log = logging.getLogger(__name__)

#: Open to everybody: they tell nothing of anybody's requests.
_OPEN = frozenset({"/", "/health", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"})
_OPEN_BELOW = "/web/"
_CLOSED = frozenset({"/web/live"})
_ID = re.compile(r"[\x21-\x7e]{1,200}")


def path_of(scope: Scope) -> str:
    """The request's path as routes know it: without ``--root-path``, which some proxies leave in."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else str(path)


def body_for(path: str) -> Callable[[ApiError], dict[str, Any]]:
    """The shape of an error in the API that ``path`` belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic_body
    if path.startswith("/api/"):
        return ollama_body
    return openai_body


def respond(path: str, error: ApiError) -> tuple[int, bytes, dict[str, str]]:
    """An error as (status, body, headers)."""
    data = json.dumps(body_for(path)(error), ensure_ascii=False).encode(errors="replace")
    return error.status, data, {"content-type": "application/json"} | error.headers


class BelowRoot:
    """ASGI middleware that tells routes of ``--root-path``, whether a proxy takes it off or leaves it in."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root = "/" + root_path.strip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._root}, receive, send)


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: KeyRing, rates: RateLimits) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = path_of(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        added: dict[str, str] = {"x-request-id": request_id}
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *_raw(added.items())]}
            await send(message)

        try:
            if not _is_open(path) and scope["method"] != "OPTIONS":
                added |= self._admit(scope, headers)
            await self._app(_as_routes_know_it(scope, headers, path), self._bounded(headers, receive), answer)
        except Exception as error:
            if started:  # too late for a status
                if not isinstance(error, ApiError):
                    raise
                log.warning("a request ended in mid-answer: %s", error)
                return
            if not isinstance(error, ApiError):
                log.exception("a request to %s failed", path)
            await _send_error(path, as_api_error(error), answer)

    def _admit(self, scope: Scope, headers: Headers) -> dict[str, str]:
        """Ask for the key, and count the request.

        Raises:
            ApiError: 401, no key or a wrong one; 429, too many requests.
        """
        key = None
        if self._config.wants_keys:
            kind, _, secret = headers.get("authorization", "").partition(" ")
            secret = secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not secret:
                raise ApiError(
                    401,
                    "no API key: send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            key = self._keys.find(secret)
            if key is None:
                raise ApiError(
                    401, "the API key is wrong.", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
                )
        if scope["method"] != "POST":
            return {}
        address = (scope.get("client") or ("",))[0]
        allowance = self._rates.of(key, address)
        current_allowance.set(allowance)
        return {} if allowance is None else allowance.take_request()

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` with the limits of a body's size and time.

        Raises (when called):
            ApiError: 413, 408.
        """
        limit = self._config.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise _too_large(limit)
        seen = 0
        complete = False
        deadline: float | None = None

        async def bounded() -> Message:
            nonlocal seen, complete, deadline
            if complete:
                return await receive()
            now = asyncio.get_running_loop().time()
            deadline = now + self._config.body_timeout_s if deadline is None else deadline
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - now))
            except asyncio.TimeoutError:
                raise ApiError(
                    408,
                    f"the request's body did not come in within {self._config.body_timeout_s:g} s.",
                    headers={"connection": "close"},
                ) from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen > limit:
                    raise _too_large(limit)
            else:
                complete = True
            return message

        return bounded


def _as_routes_know_it(scope: Scope, headers: Headers, path: str) -> Scope:
    """HEAD as the GET that it asks about (the HTTP server leaves the body out), and every body as JSON.

    ``curl -d`` names no JSON, and Ollama's own examples are written so. What a page of another origin may send
    without asking first (a text, a form) stays refused: browsers name the origin.

    Raises:
        ApiError: 415, a body of another kind, or a compressed one.
    """
    if scope["method"] == "HEAD" and path not in _CLOSED:
        return {**scope, "method": "GET"}
    if scope["method"] != "POST":
        return scope
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(415, f"content-encoding {coding!r} is not read here: send the body as it is.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return scope
    if kind.startswith("multipart/") or "origin" in headers:
        raise ApiError(415, f"content-type {kind!r}: send JSON, and say so (content-type: application/json).")
    own = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*own, (b"content-type", b"application/json")]}


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body is larger than {limit} bytes.", headers={"connection": "close"})


def _is_open(path: str) -> bool:
    return path in _OPEN or (path.startswith(_OPEN_BELOW) and path not in _CLOSED)


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


async def _send_error(path: str, error: ApiError, send: Send) -> None:
    status, body, headers = respond(path, error)
    headers["content-length"] = str(len(body))
    await send({"type": "http.response.start", "status": status, "headers": _raw(headers.items())})
    await send({"type": "http.response.body", "body": body})
