"""What a client is told when something is wrong, in the shape that its API has for errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dougong.errors import DougongError, EngineError, InvalidRequestError

__all__ = ["ApiError", "EngineDownError", "anthropic_body", "as_api_error", "ollama_body", "openai_body"]


class EngineDownError(EngineError):
    """The engine's process is not there: it died, or could not be started again."""


class ApiError(DougongError):
    """An answer other than success. ``type``, ``param`` and ``code`` as OpenAI's clients know them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
#: Anthropic's words, by status.
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def as_api_error(error: BaseException) -> ApiError:
    """The answer that belongs to ``error``. Of one that nobody raised on purpose only the class is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=getattr(error, "param", None))
    if isinstance(error, EngineDownError):
        return ApiError(503, str(error), headers={"retry-after": "5"})
    if isinstance(error, DougongError):
        return ApiError(500, str(error))
    return ApiError(500, f"the server failed ({type(error).__name__}); its log has the cause.")


def openai_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_body(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}
