"""Paged attention over bare tensors: plan once per step, run once per layer.

Neither the hal nor a vendor is known here; `dougong_kernels.attention` puts the hal's interface on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dougong_kernels.config import Settings, SplitConfig
from dougong_kernels.launch import Launcher, aligned
from dougong_kernels.target import early_start
from dougong_kernels.triton.extend import extend_kernel
from dougong_kernels.triton.planning import plan_kernel
from dougong_kernels.triton.split import split_kernel

__all__ = ["PagedAttention", "PagedPlan", "Shape"]

_PLAN, _SPLIT, _EXTEND = Launcher(plan_kernel), Launcher(split_kernel), Launcher(extend_kernel)

_MAX_TILE_ROWS = 64
_SPEC_TOKENS = 8
"""Batches whose longest row has at most this many queries (drafts to verify) go through the split kernel whole."""


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that is fixed when the kernels are made. `block_size` 0: K and V come without pages (ragged)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    block_size: int
    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    lse: bool = False
    latent: bool = False
    fp8: int = 0
    """0: the cache's values convert directly; 1: fp8 converted by the compiler; 2 and 3: e4m3 and e4m3fnuz decoded from
    their bytes."""
    pack_k: int = 0
    """How a head's elements lie in K's plane, see ``tiles.place_in_plane``; ``pack_v`` in V's."""
    pack_v: int = 0
    upcast: bool = False
    """Products in float32: for float32 models, and for the interpreter, whose bfloat16 products are wrong."""


@dataclass(frozen=True)
class Cut:
    """How the split kernel cuts work: heads in a tile, keys in a tile, head groups, programs, key tiles in a unit."""

    config: SplitConfig
    heads: int
    keys: int
    groups: int
    programs: int
    unit_tiles: int
    slots: int


@dataclass
class PagedPlan:
    """One step's work lists. Device buffers are made once and keep their addresses.

    `launched` is what a captured graph holds: (the split kernel's queries per row, the extend kernel's item bound);
    `cut` says how the split kernel was set up.
    """

    head: torch.Tensor
    prefix: torch.Tensor
    tiles: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    items: torch.Tensor
    split_tokens: int = 0
    cut: Cut | None = None
    max_items: int = 0
    num_tokens: int = 0
    launched: tuple[int, int] | None = None
    keep: tuple[Any, ...] = field(default=())


class PagedAttention:
    """Kernels, settings and workspace for one shape on one device.

    All runs of one object must be ordered on one stream: they share the workspace of partial results.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        max_rows: int,
        max_tokens: int,
        max_kv_len: int,
        cores: int,
        device: torch.device | str,
        settings: Settings,
        batch_invariant: bool = False,
    ) -> None:
        self.shape, self.settings, self.extend = shape, settings, settings.extend
        self.max_rows, self.max_tokens, self.max_kv_len, self.cores = max_rows, max_tokens, max_kv_len, cores
        self.device = torch.device(device)
        self.early = early_start(self.device)
        # Graphs are the device's own: torch.cuda's (HIP's too), torch.xpu's. The host records none.
        self.capturing = getattr(torch.get_device_module(self.device.type), "is_current_stream_capturing", None)
        self.invariant = batch_invariant
        # No key is farther away; what is added to a position stays within 32 bits.
        self.window = min(shape.window, 1 << 30)
        s = shape
        self.group = s.num_heads // s.num_kv_heads
        self.d_rope = s.head_dim - s.head_dim_v if s.latent else 0
        self.d_main = s.head_dim_v if s.latent else s.head_dim
        self.d_pad = max(16, _pow2(self.d_main))
        self.dv_pad = max(16, _pow2(s.head_dim_v))
        # Query heads of a kv head in one tile of the split kernel.
        self.gb = min(self.group, _MAX_TILE_ROWS)
        self.many = self._cut(settings.split, 1)
        self.few = self.many if settings.few is None else self._cut(settings.few, 1)
        short = settings.fewest_keys is None or max_kv_len <= settings.fewest_keys
        self.fewest_rows = settings.fewest_rows if short else 0
        self.fewest = self._cut(settings.fewest, 1) if short and settings.fewest is not None else self.few
        # Drafts: the tile's rows are queries too.
        self.drafts = self._cut(settings.few or settings.split, _SPEC_TOKENS)
        self.programs = max(cut.programs for cut in (self.many, self.few, self.fewest, self.drafts))
        # Extend kernel.
        self.egb = min(self.group, self.extend.rows)
        self.eqt = self.extend.rows // self.egb
        self.egroups = s.num_kv_heads * -(-self.group // self.egb)
        self._work: dict[tuple[Cut, int], tuple[torch.Tensor, torch.Tensor]] = {}
        groups = s.num_kv_heads * -(-self.group // self.gb)
        self.counters = torch.zeros(max_rows * groups, dtype=torch.int32, device=self.device)
        self._calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._workspace(self.many, 1)
        self._null = torch.zeros(1, dtype=torch.float32, device=self.device)

    def compile_ahead(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Start to compile what decodes and prompts in ``dtype`` over a cache of ``kv_dtype`` will need."""
        s, ints, floats = self.shape, torch.int32, torch.float32
        start = None if s.block_size else ints
        if s.fp8 >= 2:
            kv_dtype = torch.uint8
        sinks, slopes = (floats if s.sinks else None), (floats if s.alibi else None)
        layer = (None, 1.0, sinks, slopes, s.scale, s.softcap, self.window)
        strides = (16,) * 11
        _PLAN.compile_ahead(
            self._plan_constants(), self.device,
            (ints, ints, ints, torch.int64, ints, ints, ints, ints, ints, *(3,) * 11, *self._plan_constants()),
            self._plan_options(),
        )  # fmt: skip
        for cut in {self.many: None, self.few: None, self.fewest: None}:
            constants, options = self._call("split", cut, 1, False, False, True)
            _SPLIT.compile_ahead(constants, self.device, (
                dtype, kv_dtype, kv_dtype, dtype, None, torch.int64, ints, ints, ints, start, floats, floats, ints,
                *layer, *strides, *constants,
            ), options)  # fmt: skip
        constants, options = self._call("extend", self.many, 0, False, False, True)
        _EXTEND.compile_ahead(constants, self.device, (
            dtype, kv_dtype, kv_dtype, dtype, None, torch.int64, ints, ints, start, *layer, *strides, 3, *constants,
        ), options)  # fmt: skip

    def _plan_constants(self) -> tuple[Any, ...]:
        block = min(1024, max(64, _pow2(max(self.max_rows, self.programs))))
        return self.shape.causal, self.shape.window > 0, max(1, self.max_rows.bit_length()), block

    def _plan_options(self) -> dict[str, Any]:
        return {"num_warps": min(8, max(1, self._plan_constants()[-1] // 128))}

    def _cut(self, config: SplitConfig, tokens: int) -> Cut:
        kv_heads = self.shape.num_kv_heads
        heads = min(
            config.heads_per_tile, _MAX_TILE_ROWS // min(_MAX_TILE_ROWS, self.gb * tokens), config.columns // 16
        )
        heads = max(1, heads)
        while kv_heads % heads or heads & (heads - 1):
            heads -= 1
        keys = max(16 // heads, config.columns // heads)
        groups = kv_heads // heads * -(-self.group // self.gb)
        programs = self.cores * config.per_core
        if not self.invariant:
            return Cut(config, heads, keys, groups, programs, 1, 2 * programs)
        # Pieces whose size depends on the longest sequence allowed and on nothing in the batch.
        tiles = -(-self.max_kv_len // keys)
        unit = _pow2(max(-(-512 // keys), -(-tiles // 32)))
        units = -(-tiles // unit)
        return Cut(config, heads, keys, groups, programs, unit, self.max_rows * units * groups if units > 1 else 1)

    def _cut_for(self, num_rows: int) -> Cut:
        if self.invariant or num_rows > max(self.settings.few_rows, self.fewest_rows):
            return self.many
        return self.fewest if num_rows <= self.fewest_rows else self.few

    def _workspace(self, cut: Cut, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results [slots, rows of a tile, Dv] and their LSE, float32."""
        found = self._work.get((cut, tokens))
        if found is None:
            rows = cut.slots * tokens * self.gb * cut.heads
            acc = torch.empty(rows * self.dv_pad, dtype=torch.float32, device=self.device)
            found = acc, torch.empty(rows, dtype=torch.float32, device=self.device)
            self._work[cut, tokens] = found
        return found

    def new_plan(self) -> PagedPlan:
        def ints(n: int) -> torch.Tensor:
            return torch.zeros(n, dtype=torch.int32, device=self.device)

        items = self.max_tokens // self.eqt + self.max_rows
        return PagedPlan(
            head=torch.zeros(8, dtype=torch.int64, device=self.device),
            prefix=ints(self.max_rows + 1),
            tiles=ints(self.max_rows + 1),
            starts=ints(self.programs),
            rows=ints(3 * self.max_rows),
            items=ints(2 * items),
        )

    def plan(
        self,
        into: PagedPlan,
        cu_q: torch.Tensor,
        kv_len: torch.Tensor,
        table: torch.Tensor | None,
        *,
        num_rows: int,
        num_tokens: int,
        max_q_len: int,
        host_cu_q: torch.Tensor | None = None,
    ) -> None:
        """Fill the plan. cu_q [B+1], kv_len [B], table [B, W]: int32 on the device, read again by every run.

        host_cu_q [B+1] on the host tells which kernels a mixed batch needs; without it both are launched.
        """
        short, items = self._paths(num_rows, num_tokens, max_q_len, host_cu_q)
        if into.launched is None:
            into.cut = self.drafts if short > 1 else self._cut_for(num_rows)
        else:
            short, items = self._fit(into.launched, short, items, num_rows, num_tokens, max_q_len)
        into.split_tokens, into.max_items, into.num_tokens = short, items, num_tokens
        into.keep = (cu_q, kv_len, table)
        cut = into.cut
        assert cut is not None
        if num_rows == 0:
            into.head.zero_()
            return
        constants = self._plan_constants()
        address = cu_q if table is None else table
        _PLAN(
            (constants, cu_q.device.index, aligned(cu_q, kv_len, address)),
            (1, 1, 1),
            (
                cu_q, kv_len, address, into.head, into.prefix, into.tiles, into.starts, into.rows, into.items,
                num_rows, short, cut.groups, cut.programs, 1 if self.invariant else cut.config.min_units,
                0 if self.invariant else cut.config.half_below, cut.unit_tiles,
                0 if table is None else table.stride(0), self.eqt, cut.keys, self.window,
                *constants,
            ),
            self._plan_options(),
        )  # fmt: skip

    def _paths(self, num_rows: int, num_tokens: int, max_q_len: int, host_cu_q: torch.Tensor | None) -> tuple[int, int]:
        """(queries of a row in the split kernel, 0 for not launched; bound on the extend kernel's items)."""
        if max_q_len <= 1:
            return 1, 0
        if max_q_len <= _SPEC_TOKENS and not self.invariant and self.gb * _SPEC_TOKENS <= _MAX_TILE_ROWS:
            return _SPEC_TOKENS, 0
        if host_cu_q is None or torch.any(host_cu_q[1 : num_rows + 1] - host_cu_q[:num_rows] == 1):
            return 1, num_tokens // self.eqt + num_rows
        return (1 if self.invariant else 0), num_tokens // self.eqt + num_rows

    def _fit(
        self, launched: tuple[int, int], short: int, items: int, num_rows: int, num_tokens: int, max_q_len: int
    ) -> tuple[int, int]:
        """Keep to the launches that a captured graph holds."""
        short, bound = launched
        if max_q_len <= short:
            return short, bound
        items = num_tokens // self.eqt + num_rows
        if items > bound:
            raise ValueError(
                f"a batch of {num_rows} rows, {num_tokens} tokens and up to {max_q_len} queries per row does not fit "
                f"the captured graph, which holds up to {short} queries per row and {bound} query tiles beyond; "
                "capture a graph for the larger batch"
            )
        return short, bound

    def constants(
        self, cut: Cut, tokens: int, *, scales: bool = False, lse: bool = False, same: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Constexprs and options of the split kernel (for rows of up to `tokens` queries) and of the extend kernel."""
        s, e = self.shape, self.extend
        both = dict(
            K=s.num_kv_heads, G=self.group, PAGE=s.block_size, D=self.d_main, DP=self.d_pad, DR=self.d_rope,
            DV=s.head_dim_v, DVP=self.dv_pad, CAUSAL=s.causal, WINDOW=s.window > 0, SOFTCAP=s.softcap > 0,
            ALIBI=s.alibi, SINKS=s.sinks, FP8=s.fp8, UPCAST=s.upcast, LATENT=s.latent, SCALES=scales, LSE=lse,
            SAME=same, PACK_K=s.pack_k, PACK_V=s.pack_v,
        )  # fmt: skip
        tokens = max(1, tokens)
        block_m = max(16, _pow2(tokens * self.gb * cut.heads))
        split = dict(
            both, unit_tiles=cut.unit_tiles, GB=self.gb, HPT=cut.heads, BLOCK_M=block_m, QT=tokens,
            BLOCK_N=cut.keys, FIXED=self.invariant, STAGES=cut.config.stages, num_warps=cut.config.warps,
            # As many parts in flight as 128 registers hold.
            AT_ONCE=max(1, min(8, 128 * 32 * cut.config.warps // (block_m * self.dv_pad))),
            EARLY=bool(self.early), **self.early,
        )  # fmt: skip
        extend = dict(
            both, GB=self.egb, BLOCK_M=e.rows, QT=self.eqt, BLOCK_N=e.keys, HEADS_OUTER=e.heads_outer,
            STAGES=e.stages, num_warps=e.warps,
        )  # fmt: skip
        if e.max_registers:
            extend["maxnreg"] = e.max_registers
        return split, extend

    def _call(
        self, name: str, cut: Cut, tokens: int, scales: bool, lse: bool, same: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constexprs of a launch in the kernel's order, and its options."""
        key = name, cut, tokens, scales, lse, same
        found = self._calls.get(key)
        if found is None:
            split, extend = self.constants(cut, tokens, scales=scales, lse=lse, same=same)
            kernel, values = (split_kernel, split) if name == "split" else (extend_kernel, extend)
            ordered = tuple(values.pop(arg) for arg in kernel.arg_names if arg in values)
            found = self._calls[key] = ordered, values
        return found

    def run(
        self,
        plan: PagedPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        kv_start: torch.Tensor | None = None,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> None:
        """q [T, H, D], out [T, H, Dv], lse [T, H]; k, v [blocks, N, K, D] with any strides but the last
        (packed: any view whose first three are block, token and head).

        Ragged (block_size 0): k, v [Tk, K, D] and kv_start [B] int32, each row's first key.
        """
        s = self.shape
        if plan.num_tokens == 0:
            return
        tokens = plan.split_tokens
        scale = s.scale
        scaled = isinstance(k_scale, torch.Tensor) or isinstance(v_scale, torch.Tensor)
        if scaled:
            k_scale = k_scale if isinstance(k_scale, torch.Tensor) else self._null + k_scale
            v_scale = v_scale if isinstance(v_scale, torch.Tensor) else self._null + v_scale
        else:
            scale, k_scale = scale * float(k_scale), None  # type: ignore[assignment,arg-type]
        if s.block_size:
            kb, kn, kh = k.stride(0), k.stride(1), k.stride(2)
            vb, vn, vh = v.stride(0), v.stride(1), v.stride(2)
        else:
            (kb, kh), kn = k.stride()[:2], 0
            (vb, vh), vn = v.stride()[:2], 0
        if s.fp8 >= 2:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        strides = (
            q.stride(0), q.stride(1), kb, kn, kh, vb, vn, vh, out.stride(0), out.stride(1),
            0 if lse is None else lse.stride(0),
        )  # fmt: skip
        layer = (k_scale, v_scale, sinks, slopes, scale, s.softcap, self.window)
        same = (kb, kn, kh) == (vb, vn, vh) and s.pack_k == s.pack_v
        key = (
            strides, aligned(q, k, v, out, lse, kv_start, sinks, slopes, k_scale if scaled else None,
                             v_scale if scaled else None),
            q.dtype, k.dtype, out.dtype, q.device.index, sinks is not None and sinks.dtype,
            slopes is not None and slopes.dtype,
        )  # fmt: skip
        cut = plan.cut
        assert cut is not None
        if tokens:
            acc, acc_lse = self._workspace(cut, tokens)
            constants, options = self._call("split", cut, tokens, scaled, lse is not None, same)
            _SPLIT(
                (constants, key, cut.config.warps), (cut.programs, 1, 1),
                (q, k, v, out, lse, plan.head, plan.prefix, plan.starts, plan.rows, kv_start, acc, acc_lse,
                 self.counters, *layer, *strides, *constants),
                options,
            )  # fmt: skip
        if plan.max_items:
            constants, options = self._call("extend", cut, 0, scaled, lse is not None, same)
            _EXTEND(
                (constants, key, self.extend.warps, self.extend.max_registers), (plan.max_items * self.egroups, 1, 1),
                (q, k, v, out, lse, plan.head, plan.items, plan.rows, kv_start, *layer, *strides, plan.max_items,
                 *constants),
                options,
            )  # fmt: skip
        if plan.launched is None and self.capturing is not None and self.capturing():
            plan.launched = tokens, plan.max_items
