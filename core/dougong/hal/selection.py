"""Choosing an implementation for each op, and keeping the reasons.

Vendor kernel, then portable kernel, then torch reference, by priority: decided when the engine is built. Every refusal
is kept, so that ``dougong doctor`` can show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dougong.errors import KernelSelectionError, PluginAnswerError
from dougong.plugins import ABI, KernelSpec, Plugins, resolve_target

__all__ = ["Candidate", "Choice", "dtype_name", "select"]

#: The core itself, where plugins are named.
_CORE = "dougong"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Candidate:
    """A kernel that some plugin offers for an op."""

    plugin: str
    spec: KernelSpec

    @property
    def label(self) -> str:
        return f"{self.spec.provider} ({self.plugin})"


@dataclass(frozen=True)
class Choice:
    """What an op runs on, and why each of the others does not."""

    op: str
    candidate: Candidate
    target: Any
    refused: tuple[tuple[Candidate, str], ...] = ()

    @property
    def spec(self) -> KernelSpec:
        return self.candidate.spec

    @property
    def is_reference(self) -> bool:
        """Whether nothing but plain torch could do it."""
        return self.candidate.plugin == _CORE


def reference_candidate(op: str, target: str, features: Iterable[str] = ()) -> Candidate:
    """The torch reference of an op, always last in line."""
    spec = KernelSpec(
        op=op,
        provider="torch reference",
        abi=ABI,
        target=target,
        features=frozenset(features),
        priority=-(10**6),
        batch_invariant=False,
    )
    return Candidate(_CORE, spec)


def select(
    op: str,
    candidates: Sequence[Candidate],
    *,
    features: frozenset[str] = frozenset(),
    dtypes: frozenset[str] = frozenset(),
    layout: str = "",
    batch_invariant: bool = False,
    refuse: Callable[[Any], Iterable[object]] = lambda target: (),
    plugins: Plugins | None = None,
    query: Any = None,
    provider: str | None = None,
) -> Choice:
    """The best candidate that does what is asked.

    A kernel is refused, in this order, when it is unavailable here, lacks a feature, dtype or layout by its own
    declaration, or says so itself (``refuse(target)``, the resolved target's answer).

    Args:
        provider: take only this provider; its refusal is then an error.

    Raises:
        KernelSelectionError: none is left; the message lists each one's reason.
        PluginAnswerError: a target cannot be imported, or a plugin's selection hook answered with no candidate.
    """
    refused: list[tuple[Candidate, str]] = []
    able: list[tuple[Candidate, Any]] = []
    for candidate in sorted(candidates, key=lambda c: (-c.spec.priority, c.spec.provider)):
        spec = candidate.spec
        reason = _declared_refusal(spec, features, dtypes, layout, batch_invariant)
        if provider is not None and spec.provider != provider:
            reason = f"provider {provider!r} was asked for"
        if not reason:
            target = _resolve(op, candidate)
            reason = "; ".join(map(str, refuse(target)))
            if not reason:
                able.append((candidate, target))
        if reason:
            refused.append((candidate, reason))
    if not able:
        named = [pair for pair in refused if pair[0].spec.provider == provider]
        reasons = "\n".join(f"  - {candidate.label}: {reason}" for candidate, reason in named or refused)
        raise KernelSelectionError(
            f"no kernel for {op} can do what is asked ({query if query is not None else sorted(features)}):\n{reasons}"
        )
    chosen, target = able[0]
    if plugins is not None and len(able) > 1:
        answer = plugins.manager.hook.dougong_select_kernel(
            op=op, query=query, candidates=[candidate.spec for candidate, _ in able]
        )
        if answer is not None:
            match = [pair for pair in able if pair[0].spec == answer]
            if not match:
                raise PluginAnswerError(f"dougong_select_kernel for {op} answered {answer!r}, which is no candidate")
            chosen, target = match[0]
    for candidate, _ in able:
        if candidate is not chosen:
            refused.append((candidate, f"priority {candidate.spec.priority} below {chosen.spec.priority}"))
    return Choice(op, chosen, target, tuple(refused))


def _resolve(op: str, candidate: Candidate) -> Any:
    try:
        return resolve_target(candidate.spec.target)
    except (ImportError, AttributeError) as error:
        raise PluginAnswerError(
            f"plugin {candidate.plugin!r} offers {op} as {candidate.spec.target}, which cannot be imported: "
            f"{type(error).__name__}: {error}. Its package is incomplete; reinstall it.",
            plugin=candidate.plugin,
        ) from error


def _declared_refusal(
    spec: KernelSpec, features: frozenset[str], dtypes: frozenset[str], layout: str, batch_invariant: bool
) -> str:
    if spec.unavailable:
        return spec.unavailable
    missing = features - spec.features
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    if spec.dtypes and dtypes - spec.dtypes:
        return f"dtype {', '.join(sorted(dtypes - spec.dtypes))}: does {', '.join(sorted(spec.dtypes))}"
    if layout and spec.layouts and layout not in spec.layouts:
        return f"KV layout {layout}: reads {', '.join(spec.layouts)}"
    if batch_invariant and not spec.batch_invariant:
        return "does not declare itself batch-invariant"
    return ""
