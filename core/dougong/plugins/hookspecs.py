"""The hooks a plugin may implement. All are called at start-up, never inside a step.

A hook returns an iterable of records (or None for nothing). ``device`` is a ``dougong.hal.Device``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from dougong.plugins.records import (
    BackendSpec,
    KernelSpec,
    KVConnectorSpec,
    ModelSpec,
    QuantizationSpec,
    SchedulerSpec,
)

if TYPE_CHECKING:
    from dougong.plugins.observer import StepObserver

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "dougong"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def dougong_backends() -> Iterable[BackendSpec] | None:
    """Accelerators this plugin brings."""


@hookspec
def dougong_kernels(device: Any, backend: str) -> Iterable[KernelSpec] | None:
    """Implementations of ops for ``device``, opened as the backend of that name; nothing for one that is not yours.
    Several backends may share a device type."""


@hookspec(firstresult=True)
def dougong_select_kernel(op: str, query: Any, candidates: Sequence[KernelSpec]) -> KernelSpec | None:
    """Choose among candidates that all can do the query (an AttentionQuery, LinearQuery or OpQuery); None leaves it to
    the next plugin or the priority."""


@hookspec
def dougong_models() -> Iterable[ModelSpec] | None:
    """Model families written for the core."""


@hookspec
def dougong_quantizations() -> Iterable[QuantizationSpec] | None:
    """Weight formats."""


@hookspec
def dougong_schedulers() -> Iterable[SchedulerSpec] | None:
    """Scheduling policies."""


@hookspec
def dougong_kv_connectors() -> Iterable[KVConnectorSpec] | None:
    """Ways for KV blocks to leave or enter an engine."""


@hookspec
def dougong_cli(app: Any) -> None:
    """Add commands to the Typer application."""


@hookspec
def dougong_observers() -> Iterable[StepObserver] | None:
    """Objects that are told of every step, after it; they may not slow it."""


@hookspec
def dougong_compat_cases(device: Any, backend: str) -> Iterable[Any] | None:
    """More conformance cases, or known failures with an issue's address, for ``device``, opened as ``backend``."""
