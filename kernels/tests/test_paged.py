"""Every feature of the attention kernels against float64, with NaN in every slot that must not be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dougong_kernels.config import ExtendConfig, Settings, SplitConfig, configs_for
from dougong_kernels.paged import PagedAttention, Shape
from dougong_kernels.target import interpreted
from dougong_kernels.testing import make_problem, reference, relative_error

SPLIT = SplitConfig(heads_per_tile=2, columns=32, warps=1, stages=1, per_core=3, min_units=1)
EXTEND = ExtendConfig(rows=32, keys=32, warps=1, stages=1)
MIXED = [1, 1, 0, 20, 1, 9], [70, 0, 40, 20, 1, 45]


def shape(h: int = 4, k: int = 2, d: int = 32, dv: int = 0, n: int = 16, **more: Any) -> Shape:
    return Shape(
        num_heads=h, num_kv_heads=k, head_dim=d, head_dim_v=dv or d, block_size=n, scale=d**-0.5, lse=True,
        upcast=interpreted(), **more,
    )  # fmt: skip


def attention(
    s: Shape, device: str, split: SplitConfig = SPLIT, extend: ExtendConfig = EXTEND, few: Any = None,
    fewest: Any = None, fewest_keys: int | None = None, **more: Any,
) -> Any:  # fmt: skip
    return PagedAttention(
        s,
        max_rows=8,
        max_tokens=64,
        max_kv_len=2048,
        cores=2,
        device=device,
        settings=Settings(split, extend, few, 2 if few else 0, fewest, 1 if fewest else 0, fewest_keys),
        **more,
    )


def verify(s: Shape, rows: tuple[list[int], list[int]], device: str, *, problem: Any = None, **more: Any) -> None:
    kind = more.pop("kind", {})
    problem = problem or make_problem(s, *rows, dtype=torch.float16, device=device, **kind)
    a = attention(s, device, **more)
    inputs = problem.q.clone(), problem.table.clone(), problem.k.view(torch.uint8).clone()
    out, lse = problem.run(a)
    want, want_lse = reference(problem)
    assert relative_error(out, want) < 2e-3
    assert relative_error(lse, want_lse) < 1e-5
    assert int(a.counters.abs().sum()) == 0, "a counter was left for the next launch to trip over"
    assert torch.equal(problem.q, inputs[0]) and torch.equal(problem.table, inputs[1])
    assert torch.equal(problem.k.view(torch.uint8), inputs[2])


FEATURES = {
    "plain": {},
    "window": dict(window=13),
    "softcap, sinks and alibi": dict(softcap=3.0, sinks=True, alibi=True),
    "non-causal": dict(causal=False),
    "non-causal window": dict(causal=False, window=7),
    "one head": dict(h=1, k=1),
    "group of 3": dict(h=6, k=2),
    "group of 7, page 48": dict(h=7, k=1, n=48),
    "group of 40 over tiles of 32 rows": dict(h=40, k=1),
    "page 1": dict(n=1),
    "page 64": dict(n=64),
    "page 24": dict(n=24),
    "D 40, Dv 24": dict(d=40, dv=24),
    "D 16": dict(d=16),
    "D 96": dict(d=96),
}


@pytest.mark.parametrize("name", FEATURES)
def test_mixed_batch(name: str, device: str) -> None:
    verify(shape(**FEATURES[name]), MIXED, device)


@pytest.mark.parametrize("name", ["plain", "window", "softcap, sinks and alibi", "non-causal window"])
def test_short_rows_are_split_and_merged(name: str, device: str) -> None:
    verify(shape(**FEATURES[name]), ([1, 1, 1], [150, 33, 0]), device)
    verify(shape(**FEATURES[name]), ([3, 8, 1], [65, 8, 33]), device)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_per_tile(heads: int, device: str) -> None:
    verify(shape(8, 4), ([1, 1, 1], [70, 1, 17]), device, split=replace(SPLIT, heads_per_tile=heads, columns=64))


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_edges_of_blocks_and_tiles(length: int, device: str) -> None:
    verify(shape(), ([1, 2], [length, length]), device)
    verify(shape(window=16), ([10], [length]), device)


def test_few_rows_have_settings_of_their_own(device: str) -> None:
    few = replace(SPLIT, heads_per_tile=1, columns=16)
    verify(shape(), ([1, 1], [70, 33]), device, few=few)
    verify(shape(), ([1, 1, 1], [70, 33, 1]), device, few=few)
    verify(shape(), ([1], [70]), device, few=few, fewest=replace(few, per_core=1))


@pytest.mark.parametrize("rows, expected", [(1, "fewest"), (2, "few"), (3, "many")])
def test_the_number_of_rows_chooses_the_settings(rows: int, expected: str) -> None:
    few, fewest = replace(SPLIT, columns=64), replace(SPLIT, columns=16)
    made = attention(shape(), "cpu", few=few, fewest=fewest)
    assert made._cut_for(rows) is getattr(made, expected)


@pytest.mark.parametrize("keys, expected", [(2048, "fewest"), (2047, "few"), (None, "fewest")])
def test_the_longest_row_allowed_chooses_the_settings_of_the_fewest_rows(keys: int | None, expected: str) -> None:
    """The objects here hold rows of up to 2,048 keys; what a batch's rows have must not matter to a captured graph."""
    few, fewest = replace(SPLIT, columns=64), replace(SPLIT, columns=16)
    made = attention(shape(), "cpu", few=few, fewest=fewest, fewest_keys=keys)
    assert made._cut_for(1) is getattr(made, expected)
    assert made._cut_for(2) is made.few and made._cut_for(3) is made.many


def test_the_h100_table_keeps_one_program_per_core_to_short_contexts() -> None:
    for head_dim in (64, 128):
        found = configs_for("sm90", head_dim)
        assert found.fewest is not None and found.fewest.per_core == 1
        assert (found.fewest_rows, found.fewest_keys) == (2, 16384)
    assert configs_for("sm80", 128).fewest is None


def test_windows_share_one_compiled_kernel() -> None:
    """A model whose layers have windows of several sizes compiles once."""
    one, other, none = (attention(shape(window=window), "cpu") for window in (5, 4096, 0))
    assert one._plan_constants() == other._plan_constants() != none._plan_constants()
    calls = [made._call("split", made.many, 1, False, False, True) for made in (one, other, none)]
    assert calls[0] == calls[1] != calls[2]
    assert (one.window, other.window, attention(shape(window=1 << 40), "cpu").window) == (5, 4096, 1 << 30)


def test_window_edges(device: str) -> None:
    for window in (1, 15, 16, 17, 200):
        verify(shape(window=window), ([1, 1], [33, 48]), device)


def test_more_queries_than_keys(device: str) -> None:
    verify(shape(), ([20, 3, 5], [10, 1, 0]), device)


def test_empty_batch_writes_nothing(device: str) -> None:
    problem = make_problem(shape(), [0, 0], [5, 0], dtype=torch.float16, device=device)
    out, _ = problem.run(attention(shape(), device))
    assert out.shape[0] == 0


@pytest.mark.parametrize("fp8", [1, 2])
def test_fp8_cache(fp8: int, device: str) -> None:
    kind = {"kv_dtype": torch.float8_e4m3fn, "tensor_scales": fp8 == 2}
    verify(shape(fp8=fp8), MIXED, device, kind=kind)


def test_int8_cache(device: str) -> None:
    verify(shape(), MIXED, device, kind={"kv_dtype": torch.int8})
    verify(shape(), ([1], [20]), device, kind={"kv_dtype": torch.int8, "tensor_scales": True})


def test_latent_cache(device: str) -> None:
    s = shape(5, 1, 48, 32, latent=True)
    verify(s, MIXED, device, split=replace(SPLIT, heads_per_tile=1))


def test_ragged(device: str) -> None:
    verify(shape(n=0, causal=False), ([20, 0, 1, 9], [20, 0, 1, 9]), device)
    verify(shape(n=0), ([1, 12], [40, 12]), device)


def test_float32(device: str) -> None:
    s = replace(shape(), upcast=True)
    problem = make_problem(s, *MIXED, dtype=torch.float32, device=device)
    out, lse = problem.run(attention(s, device))
    want, want_lse = reference(problem)
    assert relative_error(out, want) < 2e-6 and relative_error(lse, want_lse) < 2e-6


def test_batch_invariant_rows_keep_their_bits(device: str) -> None:
    s = shape()
    a = attention(s, device, batch_invariant=True)
    a.many = replace(a.many, unit_tiles=2, slots=8 * 40 * a.many.groups)
    q_lens, kv_lens = [1, 1, 20, 1], [300, 33, 30, 100]
    problem = make_problem(s, q_lens, kv_lens, dtype=torch.float16, device=device)
    whole, _ = problem.run(a)
    want, _ = reference(problem)
    assert relative_error(whole, want) < 2e-3
    cu = problem.cu_q.tolist()
    for b in range(4):
        alone = replace(
            problem, q_lens=[q_lens[b]], kv_lens=[kv_lens[b]], q=problem.q[cu[b] : cu[b + 1]],
            table=problem.table[b : b + 1], cu_q=problem.cu_q[b : b + 2] - cu[b], kv_len=problem.kv_len[b : b + 1],
        )  # fmt: skip
        assert torch.equal(alone.run(a)[0], whole[cu[b] : cu[b + 1]])


def test_bits_do_not_depend_on_poison_or_block_names(device: str) -> None:
    s = shape()
    problem = make_problem(s, [1, 20], [70, 40], dtype=torch.float16, device=device)
    a = attention(s, device)
    out, _ = problem.run(a)
    clean = make_problem(s, [1, 20], [70, 40], dtype=torch.float16, device=device, poison=False)
    assert torch.equal(clean.run(a)[0], out)
    order = torch.randperm(len(problem.k), device=device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=device)
    renamed = problem.table.clone()
    known = renamed < len(order)
    renamed[known] = place[renamed[known].long()].int()
    moved = replace(problem, k=problem.k[order], v=problem.v[order], table=renamed)
    assert torch.equal(moved.run(a)[0], out)


def test_blocks_before_the_window_are_never_addressed(device: str) -> None:
    s = shape(window=20)
    problem = make_problem(s, [1, 4], [100, 90], dtype=torch.float16, device=device)
    want, _ = reference(problem)
    # The manager frees blocks wholly behind the window and leaves 0; block 0 holds NaN here.
    problem.table[0, : (100 - 20) // 16] = 0
    problem.table[1, : (90 - 4 - 19) // 16] = 0
    out, _ = problem.run(attention(s, device))
    assert relative_error(out, want) < 2e-3


def test_offsets_beyond_32_bits(device: str) -> None:
    """Blocks 2**20 elements apart: the last of 2,100 lies beyond 2**31 elements; memory between stays untouched."""
    s = shape(2, 1, 16)
    stride, blocks = 1 << 20, 2100
    storage = torch.empty(stride * (blocks - 1) + 16 * 16, dtype=torch.float16, device=device)
    k = storage.as_strided((blocks, 16, 1, 16), (stride, 16, 16, 1))
    problem = make_problem(s, [1, 3], [16, 20], dtype=torch.float16, device=device)
    want, _ = reference(problem)
    far = [blocks - 1, blocks - 2, blocks - 3]
    names = [(0, 0), (1, 0), (1, 1)]
    v = torch.empty_like(storage).as_strided((blocks, 16, 1, 16), (stride, 16, 16, 1))
    for name, (row, at) in zip(far, names, strict=True):
        old = int(problem.table[row, at])
        k[name], v[name] = problem.k[old], problem.v[old]
        problem.table[row, at] = name
    out, _ = replace(problem, k=k, v=v).run(attention(s, device))
    assert relative_error(out, want) < 2e-3


def test_captured_plan_follows_new_batches_and_refuses_larger_ones(device: str) -> None:
    s = shape()
    a = attention(s, device)
    plan = a.new_plan()
    first = make_problem(s, [1, 1, 20], [33, 40, 20], dtype=torch.float16, device=device)
    first.plan(a, plan)
    plan.launched = plan.split_tokens, plan.max_items
    # No decode rows, then only decode rows, through the same two launches.
    for rows in (([10, 11], [30, 11]), ([1, 1, 1], [9, 0, 70]), ([1, 21], [80, 21])):
        problem = make_problem(s, *rows, dtype=torch.float16, device=device, seed=3)
        out, _ = problem.run(a, plan)
        assert plan.launched == (plan.split_tokens, plan.max_items)
        assert relative_error(out, reference(problem)[0]) < 2e-3
    large = make_problem(s, [60], [60], dtype=torch.float16, device=device)
    plan.launched = 1, 2
    with pytest.raises(ValueError, match="does not fit the captured graph"):
        large.plan(a, plan)


def test_a_capture_pins_the_plan_on_any_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own module says that a graph is being captured, XPU's too: replays keep to its launches."""
    module = torch.get_device_module(device)
    a = attention(shape(), device)
    plan = a.new_plan()
    problem = make_problem(shape(), [1, 20], [33, 20], dtype=torch.float16, device=device)
    problem.run(a, plan)
    assert plan.launched is None
    monkeypatch.setattr(module, "is_current_stream_capturing", lambda: True, raising=False)
    a = attention(shape(), device)
    plan = a.new_plan()
    problem.run(a, plan)
    assert plan.launched == (plan.split_tokens, plan.max_items) == (1, 3)
