"""Opening a backend: which one, its device, and what every op runs on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong.errors import BackendNotFoundError, DougongError, PluginAnswerError
from dougong.hal.attention import AttentionKernel, AttentionQuery
from dougong.hal.device import Device
from dougong.hal.layout import NHD, KVLayout
from dougong.hal.linear import LinearKernel, LinearQuery
from dougong.hal.ops import CLASS_OPS, FUNCTION_OPS, OpQuery, OpTable
from dougong.hal.selection import Candidate, Choice, dtype_name, reference_candidate, select
from dougong.plugins import BackendSpec, Plugins, Probe, load_plugins, resolve_target

__all__ = ["ENV_BACKEND", "Backend", "BackendReport", "find_backends", "open_backend"]

ENV_BACKEND = "DOUGONG_BACKEND"

ALL_FEATURES = (
    "window", "softcap", "alibi", "sinks", "lse", "noncausal", "dv", "latent", "ragged", "strided",
    "kv_int8", "kv_fp8_e4m3", "kv_fp8_e5m2", "kv_fp8_e4m3fnuz",
)  # fmt: skip


@dataclass(frozen=True)
class BackendReport:
    """A backend that some plugin brings, and whether it can run here."""

    plugin: str
    spec: BackendSpec
    probe: Probe


def find_backends(plugins: Plugins) -> list[BackendReport]:
    """Every backend, the best first. A probe that raises counts as a refusal with that reason.

    Raises:
        PluginAnswerError: two plugins bring a backend of the same name, or a probe answers a wrong type.
    """
    reports: list[BackendReport] = []
    for plugin, spec in plugins.records("dougong_backends"):
        for other in reports:
            if other.spec.name == spec.name:
                raise PluginAnswerError(
                    f"plugins {other.plugin!r} and {plugin!r} both bring a backend {spec.name!r}; exclude one with "
                    f"DOUGONG_PLUGINS=-{plugin}",
                    plugin=plugin,
                )
        try:
            probe = spec.probe()
        except Exception as error:
            probe = Probe(ok=False, reason=f"its probe raised {type(error).__name__}: {error}")
        if not isinstance(probe, Probe):
            raise PluginAnswerError(
                f"plugin {plugin!r}: the probe of backend {spec.name!r} answered {probe!r}; expected a Probe",
                plugin=plugin,
                version=plugins.version(plugin),
            )
        reports.append(BackendReport(plugin, spec, probe))
    return sorted(reports, key=lambda report: (not report.probe.ok, -report.spec.score, report.spec.name))


@dataclass
class Backend:
    """A device and the kernels that installed plugins offer for it."""

    name: str
    plugin: str
    device: Device
    plugins: Plugins
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)

    def choose_attention(self, query: AttentionQuery, provider: str | None = None) -> Choice:
        """The attention kernel for a query; ``Choice.target`` is an AttentionKernel subclass.

        Raises:
            KernelSelectionError: none can; each reason is listed.
        """
        return select(
            "attention",
            [*self.candidates.get("attention", ()), _REFERENCE_ATTENTION],
            features=query.features(),
            dtypes=frozenset({dtype_name(query.spec.dtype)}),
            layout=query.layout.name,
            batch_invariant=query.batch_invariant,
            refuse=lambda target: self._ask(target, AttentionKernel, query),
            plugins=self.plugins,
            query=query,
            provider=provider,
        )

    def choose_linear(self, query: LinearQuery, provider: str | None = None) -> Choice:
        """The matrix product for a query; ``Choice.target`` is a LinearKernel subclass.

        Raises:
            KernelSelectionError: none can; each reason is listed.
        """
        return select(
            "linear",
            [*self.candidates.get("linear", ()), _REFERENCE_LINEAR],
            features=frozenset() if query.format == "dense" else frozenset({query.format}),
            dtypes=frozenset({dtype_name(query.dtype)}),
            refuse=lambda target: self._ask(target, LinearKernel, query),
            plugins=self.plugins,
            query=query,
            provider=provider,
        )

    def op_table(
        self, dtype: torch.dtype, layout: KVLayout = NHD, providers: Mapping[str, str] | None = None
    ) -> OpTable:
        """The functional ops for models in ``dtype`` over caches in ``layout``; an op in ``providers`` takes that one's
        implementation only.

        Raises:
            KernelSelectionError, PluginAnswerError: as ``select``.
        """
        table = OpTable()
        for op in FUNCTION_OPS:
            touches = op in ("qk_norm_rope_write", "copy_blocks")
            query = OpQuery(op=op, dtype=dtype, layout=layout if touches else None)
            choice = select(
                op,
                [*self.candidates.get(op, ()), _REFERENCE_FUNCTIONS[op]],
                dtypes=frozenset({dtype_name(dtype)}),
                layout=layout.name if touches else "",
                refuse=lambda target, query=query: self._ask_function(target, query),  # type: ignore[misc]
                plugins=self.plugins,
                query=query,
                provider=(providers or {}).get(op),
            )
            setattr(table, op, choice.target)
            table.choices[op] = choice
        return table

    def layouts(self) -> list[KVLayout]:
        """KV layouts that the attention kernels on offer ask for, preferred first; the plain one is always there. One
        name may come with several kernels' block sizes."""
        found: list[KVLayout] = []
        for candidate in sorted(self.candidates.get("attention", ()), key=lambda c: -c.spec.priority):
            if candidate.spec.unavailable:
                continue
            offered = getattr(resolve_target(candidate.spec.target), "layouts", ())
            found += [layout for layout in offered if layout not in found]
        if all(layout.name != NHD.name for layout in found):
            found.append(NHD)
        return found

    def _ask(self, target: Any, kind: type, query: Any) -> Iterable[object]:
        if not (isinstance(target, type) and issubclass(target, kind)):
            raise PluginAnswerError(f"{target!r} is offered as a {kind.__name__} and is none")
        return target.supports(query, self.device)  # type: ignore[attr-defined,no-any-return]

    def _ask_function(self, target: Any, query: OpQuery) -> Iterable[object]:
        supports = getattr(target, "supports", None)
        return () if supports is None else supports(query, self.device)


_REFERENCE_ATTENTION = reference_candidate(
    "attention", "dougong.hal.reference.attention:ReferenceAttention", ALL_FEATURES
)
_REFERENCE_LINEAR = reference_candidate("linear", "dougong.hal.reference.linear:ReferenceLinear", ("int8", "int4"))
_REFERENCE_FUNCTIONS = {
    op: reference_candidate(op, f"{function.__module__}:{function.__name__}") for op, function in FUNCTION_OPS.items()
}


def open_backend(name: str | None = None, *, index: int = 0, plugins: Plugins | None = None) -> Backend:
    """Open the backend asked for, or the best one that this machine has.

    Args:
        name: a backend's name; None reads ``DOUGONG_BACKEND``, and without that takes the highest score.
        index: which of its devices.
        plugins: those loaded already; None loads the installed ones.

    Raises:
        BackendNotFoundError: it is not installed or cannot run here, or its device cannot be opened; the message says
            what was found.
        PluginError: a plugin cannot be used.
    """
    plugins = plugins if plugins is not None else load_plugins()
    reports = find_backends(plugins)
    wanted = name or os.environ.get(ENV_BACKEND) or None
    report = _pick(reports, wanted)
    target = resolve_target_of(report)
    try:
        device = target(index)
        device.setup()
    except DougongError:
        raise
    except Exception as error:  # a driver's own, of any kind
        raise BackendNotFoundError(
            f"backend {report.spec.name!r} cannot open device {index}: {type(error).__name__}: {error}. The probe "
            f"found {', '.join(report.probe.devices) or 'devices without names'}. Give another device_index, or mend "
            "the driver or SDK."
        ) from error
    backend = Backend(report.spec.name, report.plugin, device, plugins)
    for plugin, spec in plugins.records("dougong_kernels", device=device, backend=backend.name):
        if spec.op not in FUNCTION_OPS and spec.op not in CLASS_OPS:
            raise PluginAnswerError(
                f"plugin {plugin!r} offers a kernel for unknown op {spec.op!r}; known are "
                f"{', '.join(sorted([*FUNCTION_OPS, *CLASS_OPS]))}",
                plugin=plugin,
                version=plugins.version(plugin),
            )
        backend.candidates.setdefault(spec.op, []).append(Candidate(plugin, spec))
    return backend


def resolve_target_of(report: BackendReport) -> type[Device]:
    """The backend's Device subclass.

    Raises:
        PluginAnswerError: it cannot be imported, or is no Device.
    """
    try:
        target = resolve_target(report.spec.target)
    except (ImportError, AttributeError, OSError) as error:
        raise PluginAnswerError(
            f"backend {report.spec.name!r} (plugin {report.plugin!r}) cannot be opened: {report.spec.target}: "
            f"{type(error).__name__}: {error}",
            plugin=report.plugin,
        ) from error
    if not (isinstance(target, type) and issubclass(target, Device)):
        raise PluginAnswerError(
            f"backend {report.spec.name!r}: {report.spec.target} is {target!r}; expected a dougong.hal.Device subclass",
            plugin=report.plugin,
        )
    return target


def _pick(reports: list[BackendReport], wanted: str | None) -> BackendReport:
    def line(report: BackendReport) -> str:
        state = "ok" if report.probe.ok else f"cannot run here: {report.probe.reason}"
        return f"  - {report.spec.name} (plugin {report.plugin}): {state}"

    found = "\n".join(line(report) for report in reports) or "  none"
    if wanted is None:
        for report in reports:
            if report.probe.ok and report.spec.score >= 0:
                return report
        raise BackendNotFoundError(
            f"no backend can run on this machine. Found:\n{found}\nInstall one, e.g. pip install dougong-cpu."
        )
    for report in reports:
        if report.spec.name == wanted:
            if report.probe.ok:
                return report
            remedy = f" {report.probe.remedy}" if report.probe.remedy else ""
            raise BackendNotFoundError(
                f"backend {wanted!r} was asked for and cannot run here: {report.probe.reason}.{remedy}\nFound:\n{found}"
            )
    raise BackendNotFoundError(
        f"backend {wanted!r} was asked for and no plugin brings it. Found:\n{found}\n"
        f"Install its plugin (pip install dougong-{wanted}), or choose one of those found."
    )
