"""The page's files, and the stream of snapshots that its live view draws."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from dougong.server.errors import ApiError
from dougong.server.web.frames import engine_frame, snapshot_frame

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["router"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
#: The page loads nothing from elsewhere, runs no inline code, sends nothing elsewhere and cannot be framed.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    # Asked for again each time, answered with 304: an upgrade is seen at once.
    "Cache-Control": "no-cache",
}
#: Each viewer has a copy of each frame made; a page left open on a wall is fine, a thousand of them are not.
MOST_VIEWERS = 32


def router(state: ServerState) -> APIRouter:
    """``/`` and ``/web/…`` are files for anybody; ``/web/live`` shows who runs what and wants a key like the API."""
    routes = APIRouter()
    served = _load()
    viewers = 0

    @routes.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file(served["index.html"], request)

    @routes.get("/web/live", include_in_schema=False)
    async def live() -> Response:
        if viewers >= MOST_VIEWERS:
            raise ApiError(503, f"{MOST_VIEWERS} viewers watch the engine already; close another page first.")
        return StreamingResponse(
            watched(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )

    async def watched() -> AsyncIterator[bytes]:
        nonlocal viewers
        viewers += 1
        try:
            async for event in _events(state):
                yield event
        finally:
            viewers -= 1

    @routes.get("/web/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in served:
            raise ApiError(404, f"there is no file {name!r} here.", code="not_found")
        return _file(served[name], request)

    return routes


async def _events(state: ServerState) -> AsyncIterator[bytes]:
    """Server-sent events: ``engine`` first and after a restart, then ``snapshot`` as often as the engine tells."""
    pid, last = None, -1
    async with aclosing(state.client.subscribe()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.pid != pid:
                pid, last = snapshot.pid, -1
                yield _event("engine", engine_frame(state.client.info, state.config.model_names))
            yield _event("snapshot", snapshot_frame(snapshot, last))
            if snapshot.recent_steps:
                last = snapshot.recent_steps[-1].index


def _event(name: str, content: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(content))


class _Served:
    """A file with its content type and the mark that a browser's copy is compared by."""

    def __init__(self, name: str, content: bytes) -> None:
        self.content = content
        self.headers = {
            **_HEADERS,
            "Content-Type": _TYPES["." + name.rpartition(".")[2]],
            "ETag": f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"',
        }


def _load() -> dict[str, _Served]:
    """All of the page's files, by name. They are small and stay in memory: no path of a request meets the disk."""
    folder = files("dougong.server.web") / "static"
    return {
        one.name: _Served(one.name, one.read_bytes())
        for one in folder.iterdir()
        if one.is_file() and "." + one.name.rpartition(".")[2] in _TYPES
    }


def _file(served: _Served, request: Request) -> Response:
    if request.headers.get("if-none-match") == served.headers["ETag"]:
        return Response(status_code=304, headers={key: served.headers[key] for key in ("ETag", "Cache-Control")})
    return Response(served.content, headers=served.headers)
