"""The backend under test, as the worker sees it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.errors import BackendNotFoundError, KernelSelectionError, PluginError
from dougong.hal import HND, NHD, NZ16, X_PACKED, AttentionQuery, Backend, Candidate, Choice, KVLayout, open_backend
from dougong.plugins import Plugins, load_plugins, resolve_target
from dougong_compat.contributed import describe
from dougong_compat.harness.memory import guard_pages_work

__all__ = ["Context", "Refused", "open_context"]

_LAYOUTS = {layout.name: layout for layout in (NHD, HND, NZ16, X_PACKED)}
_BLOCKS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 544)


class Refused(Exception):
    """The backend said no before it was asked to compute: always acceptable where not declared."""


@dataclass
class OwnPlugins(Plugins):
    """The plugins of a run. A plugin may offer kernels for every device of a type, and in an engine that is welcome;
    here another vendor's would answer in this one's name. So the engine cases too are offered ``candidates`` only:
    what the backend under test has."""

    own: frozenset[str] = frozenset()
    candidates: Mapping[str, list[Candidate]] = field(default_factory=dict)

    def records(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        if hook == "dougong_kernels":
            return [(one.plugin, one.spec) for offered in self.candidates.values() for one in offered]
        return super().records(hook, **arguments)


def own_plugins(plugins: Plugins, name: str) -> frozenset[str]:
    """Plugin ``name`` and those whose module lies in the same top-level package."""
    package = {plugin.name: plugin.module.partition(":")[0].partition(".")[0] for plugin in plugins.loaded}
    return frozenset({name, *(other for other in package if package[other] == package.get(name, ""))})


class Context:
    """A backend and what follows from it. One per worker and backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.device = backend.device
        own = own_plugins(backend.plugins, backend.plugin)
        self.foreign = [
            one for candidates in backend.candidates.values() for one in candidates if one.plugin not in own
        ]
        for op, candidates in backend.candidates.items():
            backend.candidates[op] = [one for one in candidates if one.plugin in own]
        backend.plugins = OwnPlugins(backend.plugins.manager, backend.plugins.loaded, own, backend.candidates)
        self.layouts: dict[str, KVLayout] = {}
        for layout in backend.layouts():
            self.layouts.setdefault(layout.name, layout)
        self._tables: dict[torch.dtype, Any] = {}

    def layout(self, params: Mapping[str, Any]) -> KVLayout:
        """The case's layout as the backend describes it, or as the core does."""
        name = params["layout"]
        return self.layouts.get(name) or _LAYOUTS[name]

    def choose(self, query: AttentionQuery, declared: bool) -> Choice:
        """The kernel that the core would choose; for what is not declared, only the backend's own.

        Raises:
            Refused: with every reason.
        """
        spec = query.spec
        if not query.ragged:
            dims = [spec.plane_dims(name) for name in query.layout.planes]
            reason = query.layout.refusal(query.block_size, dims, spec.kv_dtype.itemsize)
            if reason:
                raise Refused(reason)
        try:
            choice = self.backend.choose_attention(query)
        except KernelSelectionError as error:
            raise Refused(str(error)) from error
        if not declared and choice.candidate.plugin == "dougong" and self.backend.candidates.get("attention"):
            raise Refused("; ".join(f"{one.label}: {why}" for one, why in choice.refused) or "not the backend's own")
        return choice

    def ops(self, dtype: torch.dtype, layout: KVLayout = NHD) -> Any:
        """The backend's functional ops."""
        try:
            return self.backend.op_table(dtype, layout)
        except KernelSelectionError as error:
            raise Refused(str(error)) from error

    def _contributed(self) -> list[tuple[str, Any]]:
        """Cases and known failures of the backend's own plugins: no other vendor may waive for it."""
        own = self.backend.plugins
        assert isinstance(own, OwnPlugins)
        answers = own.records("dougong_compat_cases", device=self.device, backend=self.backend.name)
        return [(plugin, answer) for plugin, answer in answers if plugin in own.own]

    def facts(self) -> dict[str, Any]:
        """What the parent must know to resolve cases and to fill the report."""
        try:
            memory = self.device.memory()
            total, free = memory.total, memory.free
        except Exception:
            total = free = 0
        own = [
            candidate for candidate in self.backend.candidates.get("attention", ()) if not candidate.spec.unavailable
        ]
        return {
            "backend": self.backend.name,
            "plugin": self.backend.plugin,
            "version": self.backend.plugins.version(self.backend.plugin),
            "device_type": self.device.type,
            "device": self.device.name,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.device.dtypes],
            "layouts": [
                {
                    "name": layout.name,
                    "planes": [layout.planes["k"], layout.planes["v"]] if "v" in layout.planes else None,
                    "default": layout.default_block,
                    "blocks": [size for size in _BLOCKS if layout.block_sizes.allows(size)],
                }
                for layout in self.layouts.values()
            ],
            "kernels": [
                {
                    "provider": candidate.spec.provider,
                    "plugin": candidate.plugin,
                    "version": self.backend.plugins.version(candidate.plugin),
                    "features": sorted(candidate.spec.features),
                    "dtypes": sorted(candidate.spec.dtypes),
                    "layouts": list(candidate.spec.layouts),
                    "graph": candidate.spec.graph,
                    "batch_invariant": candidate.spec.batch_invariant,
                    "needs_host_lengths": candidate.spec.needs_host_lengths,
                }
                for candidate in own
            ],
            "left_out": sorted({f"{one.spec.op}: {one.label}" for one in self.foreign}),
            "contributed": describe(self._contributed()),
            "graphs": self.device.graphs is not None,
            "pins_memory": self.device.pins_memory,
            "guard_pages": guard_pages_work(),
            "memory_total": total,
            "memory_free": free,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "facts": {str(key): str(value) for key, value in self.device.facts().items()},
        }


def open_context(name: str, extra: list[str], mutant: str = "") -> Context:
    """Open a backend by name. ``extra``: plugin modules (or ``module:object``) that are not installed.

    Raises:
        BackendNotFoundError, PluginError: as the core raises them.
    """
    modules = []
    for target in extra:
        module = resolve_target(target) if ":" in target else __import__(target, fromlist=["_"])
        modules.append((target.replace(":", "."), module() if isinstance(module, type) else module))
    plugins = load_plugins(extra=modules, strict=False)
    try:
        backend = open_backend(name, plugins=plugins)
    except BackendNotFoundError:
        for plugin in plugins.loaded:  # a plugin that failed to load is the better explanation
            if isinstance(plugin.error, PluginError) and plugin.name == name:
                raise plugin.error from None
        raise
    context = Context(backend)
    if mutant:
        from dougong_compat.selftest.plant import plant

        plant(context, mutant)
    return context
