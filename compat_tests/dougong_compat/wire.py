"""Messages between parent and worker: a JSON head and raw tensor bytes, read without trusting the sender.

A frame is a magic number, two lengths, the head and the body. Whatever a backend prints goes elsewhere, and a frame
that is not one is an outcome, not an exception in the parent.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from typing import Any

import torch

from dougong_compat.numbers import dtype_of

__all__ = ["BadFrame", "Closed", "TimedOut", "receive", "send"]

_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"dgcompat"
_LIMIT = 1 << 31


class BadFrame(Exception):
    """What came is no frame of this protocol."""


class Closed(Exception):
    """The other side is gone."""


class TimedOut(Exception):
    """Nothing, or not all of it, came in time."""


def send(where: socket.socket, message: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Send JSON-able ``message`` and host copies of ``tensors``."""
    described, body = [], bytearray()
    for name, tensor in (tensors or {}).items():
        flat = tensor.detach().to("cpu").contiguous()
        raw = flat.flatten().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        described.append([name, str(flat.dtype).removeprefix("torch."), list(flat.shape), len(raw)])
        body += raw
    head = json.dumps({"message": message, "tensors": described}).encode()
    where.sendall(_HEAD.pack(_MAGIC, len(head), len(body)) + head + bytes(body))


def receive(where: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The next message. ``deadline`` is on ``time.monotonic()``'s clock.

    Raises:
        BadFrame, Closed, TimedOut
    """
    magic, head_size, body_size = _HEAD.unpack(_exactly(where, _HEAD.size, deadline))
    if magic != _MAGIC or head_size > _LIMIT or body_size > _LIMIT:
        raise BadFrame(f"expected a frame, got {magic!r}")
    try:
        head = json.loads(_exactly(where, head_size, deadline))
        body = _exactly(where, body_size, deadline)
        tensors, at = {}, 0
        for name, dtype, shape, size in head["tensors"]:
            piece = torch.frombuffer(bytearray(body[at : at + size]), dtype=torch.uint8) if size else None
            tensors[name] = (
                torch.empty(shape, dtype=dtype_of(dtype))
                if piece is None
                else piece.view(dtype_of(dtype)).reshape(shape)
            )
            at += size
        return head["message"], tensors
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadFrame(f"{type(error).__name__}: {error}") from error


def _exactly(where: socket.socket, count: int, deadline: float | None) -> bytes:
    got = bytearray()
    while len(got) < count:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([where], [], [], left)[0]:
                raise TimedOut(f"{len(got)} of {count} bytes came in time")
        try:
            piece = where.recv(min(1 << 20, count - len(got)))
        except OSError as error:
            raise Closed(str(error)) from error
        if not piece:
            raise Closed(f"the stream ended after {len(got)} of {count} bytes")
        got += piece
    return bytes(got)
