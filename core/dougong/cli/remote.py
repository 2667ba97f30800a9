"""A small client of OpenAI-compatible servers: the standard library's, so proxies and certificates are as set up."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from dougong.errors import ConfigError, EngineError, InvalidRequestError

__all__ = ["Remote", "base_url"]


def base_url(url: str) -> str:
    """``http://host:8000/v1`` from what a person types: with or without scheme, ``/v1`` or a whole endpoint.

    Raises:
        ConfigError: there is no host in it.
    """
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}"
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url!r}: expected http(s)://host:port, e.g. http://localhost:8000.")
    path = parts.path.rstrip("/")
    for tail in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(tail)
    if not path.endswith("/v1"):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


class Remote:
    """One server.

    Args:
        timeout_s: longest silence of the server.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 300.0) -> None:
        self.url = base_url(url)
        self._key = api_key
        self._timeout = timeout_s

    def models(self) -> list[str]:
        """The names it serves.

        Raises:
            EngineError: it cannot be reached, or answers with an error.
        """
        with self._open("/models") as response:
            try:
                return [str(one["id"]) for one in json.load(response)["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise EngineError(
                    f"{self.url}/models did not answer with a list of models: is it such a server?"
                ) from error

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed chat completion.

        Raises:
            InvalidRequestError: the server refuses the request.
            EngineError: it cannot be reached, fails, or goes away in the middle.
        """
        body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **options}
        ended = False
        with self._open("/chat/completions", body) as response:
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                    if data == b"[DONE]":
                        ended = True
                    elif data:
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise EngineError(f"{self.url}: {_message(chunk)}")
                        yield chunk
            except (OSError, ValueError) as error:
                raise EngineError(f"{self.url} went away in the middle of its answer: {error}") from error
        if not ended:
            raise EngineError(f"{self.url} went away in the middle of its answer.")

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "dougong"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            try:
                said = _message(json.loads(text))
            except ValueError:
                said = text.strip()[:300]
            if error.code == 401:
                raise EngineError(f"{self.url} wants another API key (--api-key): {said}") from error
            kind = InvalidRequestError if 400 <= error.code < 500 else EngineError
            raise kind(f"{self.url}{path} answered {error.code}: {said}") from error
        except OSError as error:  # urllib.error.URLError among them
            reason = getattr(error, "reason", error)
            raise EngineError(
                f"{self.url} cannot be reached: {reason}. Is the server running (dougong serve)?"
            ) from error


def _message(body: Any) -> str:
    """The text of an error in one of the shapes that servers use."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)
