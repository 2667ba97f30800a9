"""Forming KV groups from the layers' attention, and choosing each one's kernel, layout and block size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dougong.errors import ConfigError, KernelSelectionError
from dougong.hal import AttentionQuery, AttentionSpec, Backend, Choice, KVGroup, KVLayout

__all__ = ["GroupChoice", "form_groups"]


@dataclass(frozen=True)
class GroupChoice:
    """A KV group and the kernel chosen for it."""

    group: KVGroup
    choice: Choice


def form_groups(
    specs: Sequence[AttentionSpec],
    backend: Backend,
    *,
    block_size: int | None = None,
    provider: str | None = None,
    shares: Sequence[tuple[int, int]] = (),
) -> tuple[GroupChoice, ...]:
    """Group layers whose attention is alike in everything: cache shape, window, heads, scale.

    Layers of one group share a block table, a pool, a kernel and its plan. Full attention comes before windows, so
    that group 0 decides what a pool can hold.

    Args:
        specs: by layer.
        block_size: tokens per block asked for; None takes what the kernel likes best.
        provider: take only this provider's attention kernel.
        shares: (layer, earlier layer) whose cache it reads in place of its own.

    Raises:
        KernelSelectionError: no kernel can do a layer's attention.
        ConfigError: no layout allows blocks of ``block_size``, or none that a kernel other than the reference reads.
    """
    by_spec: dict[AttentionSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        by_spec.setdefault(spec, []).append(layer)
    ordered = sorted(by_spec.items(), key=lambda item: (item[0].window is not None, item[1][0]))
    chosen = []
    for index, (spec, layers) in enumerate(ordered):
        layout, manager, kernel, choice = _choose(spec, backend, block_size, provider)
        group = KVGroup(
            index=index,
            layers=tuple(layers),
            spec=spec,
            layout=layout,
            manager_block=manager,
            kernel_block=kernel,
            shares=tuple(pair for pair in shares if pair[0] in layers),
        )
        chosen.append(GroupChoice(group, choice))
    return tuple(chosen)


def _choose(
    spec: AttentionSpec, backend: Backend, block_size: int | None, provider: str | None
) -> tuple[KVLayout, int, int, Choice]:
    """The layout whose best kernel has the highest priority: (layout, manager block, kernel block, choice)."""
    best: tuple[KVLayout, int, int, Choice] | None = None
    unfit: list[KVLayout] = []
    failures: list[KernelSelectionError] = []
    for layout in backend.layouts():
        wanted = layout.default_block if block_size is None else block_size
        kernel_block = _kernel_block(layout, spec, wanted)
        if not kernel_block:
            unfit.append(layout)
            continue
        try:
            choice = backend.choose_attention(_query(spec, layout, kernel_block), provider)
        except KernelSelectionError as error:
            failures.append(error)
            continue
        if block_size is None:
            wanted, kernel_block, choice = _tuned(spec, layout, backend, choice, provider)
        if best is None or choice.spec.priority > best[3].spec.priority:
            best = layout, wanted, kernel_block, choice
    if block_size is not None and (best is None or best[3].is_reference):
        # A kernel that does all but this size is worth more to know of than what else could not be done, and than an
        # answer from the reference.
        able = [layout for layout in unfit if _has_kernel(spec, layout, backend, provider)]
        if able:
            reasons = "\n".join(f"  - {_refusal(layout, spec, block_size)}" for layout in able)
            raise ConfigError(
                f"block_size={block_size}: the attention kernels of backend {backend.name!r} take other sizes:\n"
                + reasons
            )
    if best is not None:
        return best
    if failures:
        raise failures[0]
    reasons = "\n".join(f"  - {_refusal(layout, spec, block_size or layout.default_block)}" for layout in unfit)
    raise ConfigError(f"no KV layout on backend {backend.name!r} holds this model's cache:\n{reasons}")


def _has_kernel(spec: AttentionSpec, layout: KVLayout, backend: Backend, provider: str | None) -> bool:
    """Whether a kernel other than the reference would serve this layout in blocks of its own size."""
    if _refusal(layout, spec, layout.default_block):
        return False
    try:
        return not backend.choose_attention(_query(spec, layout, layout.default_block), provider).is_reference
    except KernelSelectionError:
        return False


def _query(spec: AttentionSpec, layout: KVLayout, block: int) -> AttentionQuery:
    return AttentionQuery(spec=spec, layout=layout, block_size=block)


def _tuned(
    spec: AttentionSpec, layout: KVLayout, backend: Backend, choice: Choice, provider: str | None
) -> tuple[int, int, Choice]:
    """The block size that the chosen kernel likes best, if it then still is the one chosen."""
    default = layout.default_block
    liked = int(choice.target.tuned_block(spec, layout, backend.device))
    if liked != default and not _refusal(layout, spec, liked):
        again = backend.choose_attention(_query(spec, layout, liked), provider)
        if again.target is choice.target:
            return liked, liked, again
    return default, default, choice


def _kernel_block(layout: KVLayout, spec: AttentionSpec, wanted: int) -> int:
    """The largest block that the layout allows and that divides ``wanted``; 0 if there is none."""
    for block in range(wanted, 0, -1):
        if wanted % block == 0 and not _refusal(layout, spec, block):
            return block
    return 0


def _refusal(layout: KVLayout, spec: AttentionSpec, block: int) -> str:
    return layout.refusal(block, [spec.plane_dims(plane) for plane in layout.planes], spec.kv_dtype.itemsize)
