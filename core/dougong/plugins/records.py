"""The records that plugins hand to the core. Frozen and keyword-only; new fields only with defaults.

Classes are named by string (``"package.module:Name"``), so that declaring a backend imports no SDK.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ABI",
    "Abi",
    "BackendSpec",
    "KVConnectorSpec",
    "KernelSpec",
    "ModelSpec",
    "Probe",
    "QuantizationSpec",
    "SchedulerSpec",
    "resolve_target",
]

Abi = tuple[int, int]

#: The vendor contract's version, (major, minor). A plugin of another major, or of a newer minor, is refused.
ABI: Abi = (1, 0)

_TARGET = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def resolve_target(target: str) -> Any:
    """Import ``"package.module:Name"`` and return the object.

    Raises:
        ImportError, AttributeError: as Python raises them; the caller names the plugin.
    """
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


class _Targeted:
    """A record that names a class or function and the contract it was built for; both are checked when it is made."""

    abi: Abi
    target: str

    def __post_init__(self) -> None:
        name, abi = type(self).__name__, self.abi
        if not isinstance(self.target, str) or not _TARGET.match(self.target):
            raise ValueError(f"{name}(target={self.target!r}): expected 'package.module:Name'")
        if not (isinstance(abi, tuple) and len(abi) == 2 and all(isinstance(part, int) for part in abi)):
            raise ValueError(f"{name}(abi={abi!r}): expected (major, minor)")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Whether a backend can run on this machine. Found without importing its SDK.

    ``reason`` says why not (or, when ok, what was found); ``devices`` are names to show;
    ``remedy`` is what to install or change.
    """

    ok: bool
    reason: str = ""
    devices: tuple[str, ...] = ()
    remedy: str = ""


def _always() -> Probe:
    return Probe(ok=True)


@dataclass(frozen=True, kw_only=True)
class BackendSpec(_Targeted):
    """An accelerator that a plugin brings.

    ``target`` names a ``dougong.hal.Device`` subclass; ``score`` orders the backends when none is asked
    for (the highest that probes well wins; the CPU has 0, a negative score is never chosen by itself).
    """

    name: str
    abi: Abi
    target: str
    probe: Callable[[], Probe] = _always
    score: int = 0
    description: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name):
            raise ValueError(f"BackendSpec(name={self.name!r}): lower-case letters, digits, '-' and '_'")


@dataclass(frozen=True, kw_only=True)
class KernelSpec(_Targeted):
    """One implementation of one op.

    ``op`` is a name of ``dougong.hal.ops`` (``"attention"``, ``"linear"``, ``"silu_mul"`` …). ``target`` names
    an ``AttentionKernel`` or ``LinearKernel`` subclass, or a function with the op's signature.
    ``features`` are the names of what it can do; the core refuses it for a query that needs another.
    ``layouts`` are the names of the KV layouts it reads and writes, preferred first.
    ``dtypes`` are torch dtype names (``"bfloat16"``); empty means any.
    ``graph`` is ``"none"`` (runs outside graphs), ``"capture"`` (safe inside) or ``"update"`` (safe, and wants
    ``update_graph`` before each replay).
    """

    op: str
    provider: str
    abi: Abi
    target: str
    features: frozenset[str] = frozenset()
    layouts: tuple[str, ...] = ()
    dtypes: frozenset[str] = frozenset()
    priority: int = 0
    graph: str = "none"
    graph_batches: str = "any"
    """What may be captured: ``"any"`` batch, or ``"decode"``: rows of one query each only."""
    needs_host_lengths: bool = False
    batch_invariant: bool = False
    unavailable: str = ""
    """Why it cannot be used on this machine ('' if it can): a package missing, a library not built."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graph not in ("none", "capture", "update"):
            raise ValueError(f"KernelSpec(graph={self.graph!r}): 'none', 'capture' or 'update'")
        if self.graph_batches not in ("any", "decode"):
            raise ValueError(f"KernelSpec(graph_batches={self.graph_batches!r}): 'any' or 'decode'")


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Targeted):
    """A model family: ``architectures`` as they stand in config.json, ``target`` a CausalLM subclass."""

    architectures: tuple[str, ...]
    abi: Abi
    target: str


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec(_Targeted):
    """A weight format: ``name`` as given to ``quantization=``, ``target`` a weight-loading class."""

    name: str
    abi: Abi
    target: str


@dataclass(frozen=True, kw_only=True)
class SchedulerSpec(_Targeted):
    """A scheduling policy: ``name`` as given to ``scheduling_policy=``, ``target`` a ``dougong.scheduling.Policy``: a
    function (request, order of arrival, step, config) -> (rank, order of arrival); the lowest goes first."""

    name: str
    abi: Abi
    target: str


@dataclass(frozen=True, kw_only=True)
class KVConnectorSpec(_Targeted):
    """A way for KV blocks to leave or enter an engine: ``name`` as given to ``kv_connector=``, ``target`` a
    ``dougong.plugins.KVConnector`` subclass, ``options`` its defaults."""

    name: str
    abi: Abi
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
