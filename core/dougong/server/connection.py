"""One connection, with an end to what uvicorn waits for without limit: a head that does not come in whole, and an
answer that its client does not take."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from dougong.server.errors import ApiError, openai_body

__all__ = ["PatientProtocol", "patient"]

log = logging.getLogger(__name__)

#: Bytes of a head; h11 has the same bound, httptools has none.
_MOST_HEAD_BYTES = 64 * 1024
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class _Outbox:
    """A transport that counts what is given to it; in all else the transport itself."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.given = 0

    def write(self, data: bytes) -> None:
        self.given += len(data)
        self._transport.write(data)

    @property
    def taken(self) -> int:
        """Bytes that the operating system has taken for the client."""
        return self.given - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # h11's or httptools', whichever is there
    """uvicorn's protocol with two time limits.

    A head has `head_timeout_s` from the connection's opening, or from its first byte on a connection that was kept; its
    body and its answer have limits of their own. A client that takes nothing of what lies ready for it within
    `write_timeout_s` is cut off, also when the answer is complete: closing a socket waits for what it still holds.
    """

    head_timeout_s: ClassVar[float] = 30.0
    write_timeout_s: ClassVar[float] = 120.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._outbox = _Outbox(transport)
        self._taken, self._taken_at = 0, self.loop.time()
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        super().connection_made(self._outbox)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering:
            self._got_head()
        elif not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self._refuse(431, f"the request's head is larger than {_MOST_HEAD_BYTES} bytes.")
            elif self._head_timer is None:
                self._await_head()

    @property
    def _answering(self) -> bool:
        """A request's head is here, and its answer is not over."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_overdue)

    def _got_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if self._answering or self.transport.is_closing():
            return
        if self._head_bytes:
            self._refuse(408, f"the request's head did not come in within {self.head_timeout_s:g} s.")
        else:  # a connection opened in advance
            self.transport.close()

    def _refuse(self, status: int, text: str) -> None:
        """Answer what is no request yet, and close."""
        body = json.dumps(openai_body(ApiError(status, text))).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status, _REASONS[status].encode(), len(body), body)
        )
        self.transport.close()

    def check_reader(self, now: float) -> None:
        """Cut the client off if it has taken nothing of what lies ready since `write_timeout_s`.

        Args:
            now: on the event loop's clock; called again and again.
        """
        taken = self._outbox.taken
        if taken == self._outbox.given or taken != self._taken:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at > self.write_timeout_s:
            log.warning("a client took nothing of its answer for %g s and is cut off", self.write_timeout_s)
            self.transport.abort()


def patient(head_timeout_s: float, write_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol with these limits, in seconds."""
    limits = {"head_timeout_s": head_timeout_s, "write_timeout_s": write_timeout_s}
    return type("PatientProtocol", (PatientProtocol,), limits)
