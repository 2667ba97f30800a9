"""Responses kept for ``previous_response_id``: in memory, bounded, each to be seen by its owner alone."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from dougong.server.errors import ApiError

__all__ = ["ResponseStore", "StoredResponse", "owner_of"]


@dataclass(frozen=True)
class StoredResponse:
    """A response with its conversation: ``before`` and ``given`` are the items that it answers, the request's own
    being ``given``."""

    owner: str
    body: dict[str, Any]
    before: list[dict[str, Any]]
    given: list[dict[str, Any]]
    size: int

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All items, the answer's included."""
        return [*self.before, *self.given, *self.body["output"]]


def owner_of(headers: Headers) -> str:
    """Who asks, told apart by the key that the request showed."""
    secret = headers.get("authorization", "") or headers.get("x-api-key", "")
    return hashlib.blake2b(secret.encode(), digest_size=16).hexdigest() if secret else ""


class ResponseStore:
    """The newest responses.

    Args:
        most: how many are kept.
        most_bytes: how much they may take, as JSON.
    """

    def __init__(self, most: int = 1000, most_bytes: int = 64 << 20) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, owner: str, body: dict[str, Any], before: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
        """Keep a response; the oldest ones go where there is no room. One that is too large alone is not kept."""
        size = len(json.dumps([body, before, given]))
        if size > self._most_bytes:
            return
        self._kept[body["id"]] = StoredResponse(owner, body, before, given, size)
        self.size += size
        while len(self._kept) > self._most or self.size > self._most_bytes:
            _, gone = self._kept.popitem(last=False)
            self.size -= gone.size

    def get(self, owner: str, name: str) -> StoredResponse:
        """A response by its id.

        Raises:
            ApiError: 404, it is not there, or somebody else's.
        """
        found = self._kept.get(name)
        if found is None or found.owner != owner:
            raise ApiError(
                404,
                f"there is no response {name!r}: it was not stored, is too old, or the server was started since.",
                type="invalid_request_error",
                code="response_not_found",
            )
        self._kept.move_to_end(name)
        return found

    def delete(self, owner: str, name: str) -> None:
        """Forget a response.

        Raises:
            ApiError: 404.
        """
        found = self.get(owner, name)
        del self._kept[name]
        self.size -= found.size
