"""The ASGI application: every route, and what happens to errors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from dougong import __version__
from dougong.errors import DougongError
from dougong.server.errors import ApiError, as_api_error
from dougong.server.guard import BelowRoot, Guard, path_of, respond
from dougong.server.http_metrics import HttpMetrics
from dougong.server.state import ServerState
from dougong.server.strict_json import check_json

__all__ = ["ROUTERS", "build_app"]

#: Modules that each have a function ``router(state) -> APIRouter``.
ROUTERS = [
    "dougong.server.openai.chat",
    "dougong.server.openai.completions",
    "dougong.server.openai.embeddings",
    "dougong.server.openai.models",
    "dougong.server.openai.tokenize",
    "dougong.server.openai.responses",
    "dougong.server.anthropic.messages",
    "dougong.server.ollama.api",
    "dougong.server.metrics",
    "dougong.server.web.routes",
]
#: Faults named in one answer.
_ANSWERS = 5


def build_app(state: ServerState) -> FastAPI:
    """The application over a running engine."""
    config = state.config
    app = FastAPI(
        title="dougong",
        version=__version__,
        summary="One LLM serving core for every accelerator",
        docs_url="/docs" if config.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if config.docs else None,
        # A 422 is FastAPI's word for what is a 400 in every API here.
        responses={400: {"description": "The request is wrong"}, 401: {"description": "No key, or a wrong one"}},
        dependencies=[Depends(check_json)],
    )
    optional = {"dougong.server.metrics": config.metrics, "dougong.server.web.routes": config.web}
    routes = list(app.routes)
    for name in ROUTERS:
        if optional.get(name, True):
            made = import_module(name).router(state)
            routes += made.routes
            app.include_router(made)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(DougongError, _known)
    app.add_middleware(Guard, config=config, keys=state.keys, rates=state.rates)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["DELETE", "GET", "HEAD", "OPTIONS", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(HttpMetrics, counts=state.metrics.http, routes=routes)  # stands outside of those above
    if config.root_path:
        app.add_middleware(BelowRoot, root_path=config.root_path)
    _describe(app)
    return app


def _answer(request: Request, error: ApiError) -> Response:
    status, body, headers = respond(path_of(request.scope), error)
    return Response(body, status, headers)


async def _known(request: Request, error: Exception) -> Response:
    return _answer(request, as_api_error(error))


async def _http(request: Request, error: Exception) -> Response:
    """What Starlette says itself: no such path, wrong method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # FastAPI takes whatever stops the reading of a body for bad JSON
        return _answer(request, error.__cause__)
    text = str(error.detail)
    if error.status_code == 404:
        text = f"there is nothing at {request.method} {request.url.path}."
    elif error.status_code == 405:
        text = f"{request.method} is not allowed at {request.url.path}."
    return _answer(request, ApiError(error.status_code, text, headers=dict(error.headers or {})))


async def _validation(request: Request, error: Exception) -> Response:
    """A body of the wrong shape: which fields, and what is wrong with each. What was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    faults: list[tuple[str, str]] = []
    for fault in error.errors():
        place = [str(part) for part in fault["loc"] if part != "body"]
        if fault["type"] == "json_invalid":
            context: dict[str, Any] = fault.get("ctx") or {}
            faults.append(("", f"the body is no valid JSON: {context.get('error', fault['msg'])}"))
        else:
            faults.append((".".join(place), fault["msg"]))
    shown = "; ".join(f"{field}: {text}" if field else text for field, text in faults[:_ANSWERS])
    more = len(faults) - _ANSWERS
    text = shown + (f"; and {more} more" if more > 0 else "")
    param = faults[0][0] if faults and faults[0][0] else None
    return _answer(request, ApiError(400, text, param=param))


def _describe(app: FastAPI) -> None:
    """The OpenAPI document without FastAPI's 422, which no route gives."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path in document.get("paths", {}).values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way of changing the document
