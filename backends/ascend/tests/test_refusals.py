"""Every documented refusal: the twin says no, as the device does. That the backend never asks is the part of
test_never_asked.py, and of test_limits.py and test_attention.py: the same rules stand behind every call there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from dougong_ascend.attention import causal_mask
from dougong_ascend.twin import TwinRefusal
from dougong_ascend.twin.settings import settings

BF16 = torch.bfloat16


def on(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="npu")


def table(rows: int = 2, width: int = 2, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=dtype, device="npu")


def call(
    version: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, arguments: dict[str, Any]
) -> Any:
    names = {
        "actual_seq_lengths": "actual_seq_qlen", "actual_seq_lengths_kv": "actual_seq_kvlen",
        "num_heads": "num_query_heads", "scale": "softmax_scale", "softmax_lse_flag": "return_softmax_lse",
        "key_antiquant_scale": "dequant_scale_key", "value_antiquant_scale": "dequant_scale_value",
        "key_antiquant_mode": "key_quant_mode", "value_antiquant_mode": "value_quant_mode",
    }  # fmt: skip
    value = key if value is None else value
    if version == 1:
        return torch.ops.npu.npu_fused_infer_attention_score(query, key, value, **arguments)
    renamed = {names.get(name, name): given for name, given in arguments.items()}
    return torch.ops.npu.npu_fused_infer_attention_score_v2(query, key, value, **renamed)


def decode(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good call with one query per row; ``changes`` replace q, k, v or arguments (None takes one away)."""
    q, k, v = changes.pop("q", on(2, 4, 1, 32)), changes.pop("k", on(3, 16, 64)), changes.pop("v", None)
    arguments = {
        "num_heads": 4, "num_key_value_heads": 2, "scale": 1.0, "input_layout": "BNSD", "block_table": table(),
        "block_size": 16, "actual_seq_lengths_kv": [3, 20],
    } | changes  # fmt: skip
    return q, k, v, {name: given for name, given in arguments.items() if given is not None}


def prompt(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good call with three queries per row."""
    defaults = {
        "q": on(2, 3, 4, 32), "k": on(3, 128, 64), "input_layout": "BSND", "block_size": 128, "sparse_mode": 3,
        "atten_mask": causal_mask(torch.device("npu", 0)), "actual_seq_lengths_kv": [3, 130],
    }  # fmt: skip
    return decode(**(defaults | changes))


def mla(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good MLA call with one query per row."""
    heads = changes.pop("heads", 32)
    defaults = {
        "q": on(2, heads, 1, 512), "k": on(3, 16, 512), "num_heads": heads, "num_key_value_heads": 1,
        "query_rope": on(2, heads, 1, 64), "key_rope": on(3, 16, 64),
    }  # fmt: skip
    return decode(**(defaults | changes))


def decode8(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good call with one query per row over an int8 cache."""
    defaults = {
        "k": on(3, 32, 64, dtype=torch.int8), "block_size": 32, "key_antiquant_scale": on(1),
        "value_antiquant_scale": on(1),
    }  # fmt: skip
    return decode(**(defaults | changes))


def mla_nz(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good MLA call over a cache in tiles."""
    defaults = {
        "q": on(2, 1, 32, 512), "query_rope": on(2, 1, 32, 64), "k": on(3, 1, 32, 128, 16), "block_size": 128,
        "key_rope": on(3, 1, 4, 128, 16), "input_layout": "BSND",
    }  # fmt: skip
    return mla(**(defaults | changes))


def dense(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good call of three queries per row over keys without pages."""
    defaults = {"k": on(2, 9, 2, 32), "block_table": None, "block_size": None, "actual_seq_lengths_kv": [3, 9]}
    return prompt(**(defaults | changes))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("make", [decode, decode8, prompt, mla, mla_nz, dense])
def test_the_good_calls_pass(make: Any, version: int) -> None:
    out, _ = call(version, *make())
    assert not out.isnan().any()


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (decode, {"q": lambda: on(2, 4, 1, 32, dtype=torch.float32)}, "float16 or bfloat16"),
    (decode, {"k": lambda: on(3, 16, 64, dtype=torch.float16)}, "query in"),
    (decode, {"q": lambda: on(2, 4, 1, 64)[..., ::2]}, "not contiguous"),
    (decode, {"q": lambda: on(2, 4, 1, 40), "k": lambda: on(3, 16, 80)}, "multiple of 16"),
    (decode, {"q": lambda: on(2, 4, 1, 528), "k": lambda: on(3, 16, 1056)}, "at most 512"),
    (decode, {"num_heads": 3}, "the query has 4"),
    (decode, {"num_key_value_heads": 3}, "kv heads"),
    (decode, {"q": lambda: on(2, 66, 1, 32), "k": lambda: on(3, 16, 32), "num_heads": 66, "num_key_value_heads": 1},
     "more than 64"),
    (decode, {"q": lambda: on(2, 258, 1, 32), "k": lambda: on(3, 16, 32 * 129), "num_heads": 258,
              "num_key_value_heads": 129}, "at most 256"),
    (decode, {"block_table": lambda: table(dtype=torch.int64)}, "int32"),
    (decode, {"block_table": lambda: table(rows=3)}, "for 2 rows"),
    (decode, {"block_table": lambda: table(width=1)}, "2 blocks in a row"),
    (decode, {"block_table": lambda: table() + 3}, "leaves the cache"),
    (decode, {"block_table": lambda: table() - 1}, "leaves the cache"),
    (decode, {"block_table": lambda: torch.zeros(2, 2, dtype=torch.int32)}, "not on the device"),
    (decode, {"block_size": 0}, "block_size is 0"),
    (decode, {"block_size": 32}, "blocks of 16"),
    (decode, {"k": lambda: on(3, 24, 64), "block_size": 24}, "multiples of 16"),
    (decode, {"k": lambda: on(3, 528, 64), "block_size": 528}, "up to 512"),
    (decode, {"v": lambda: on(3, 16, 128)}, "differ"),
    (decode, {"k": lambda: on(3, 16, 32)}, "K·D"),
    (decode, {"k": lambda: on(3, 16, 2 * 65536 // 2), "num_key_value_heads": 128, "num_heads": 128,
              "q": lambda: on(2, 128, 1, 512)}, "at most 65535"),
    (decode, {"k": lambda: torch.zeros(1, dtype=BF16, device="npu").expand(2**21, 16, 64)}, "not contiguous"),
    (decode, {"actual_seq_lengths_kv": None}, "needs kv lengths"),
    (decode, {"actual_seq_lengths_kv": [3, 20, 4][:0]}, "0 kv lengths"),
    (decode, {"actual_seq_lengths_kv": [-1, 20]}, "negative"),
    (decode, {"actual_seq_lengths_kv": [0, 20]}, "kv length of 0"),
    (decode, {"input_layout": "QQQ"}, "input_layout"),
    (decode, {"inner_precise": 2}, "0 or 1"),
    (decode, {"atten_mask": lambda: on(2, 1, 1, 16, dtype=torch.bool)}, "covers 16 keys of 32"),
    (decode, {"atten_mask": lambda: on(2, 1, 1, 32)}, "bool, int8 or uint8"),
    (decode, {"pse_shift": lambda: on(2, 4, 1, 32)}, "not modelled"),
    (prompt, {"k": lambda: on(3, 16, 64), "block_size": 16, "actual_seq_lengths_kv": [3, 20]}, "multiples of 128"),
    (prompt, {"k": lambda: on(3, 192, 64), "block_size": 192}, "multiples of 128"),
    (prompt, {"k": lambda: on(3, 640, 64), "block_size": 640}, "up to 512"),
    (prompt, {"k": lambda: on(3, 2, 128, 32)}, "heads outside under BSND"),
    (prompt, {"q": lambda: on(2, 3, 128, 512), "num_heads": 128, "k": lambda: on(3, 128, 1024)}, "below 65535"),
    (prompt, {"atten_mask": None}, "without a mask"),
    (prompt, {"atten_mask": lambda: on(128, 128, dtype=torch.bool)}, "2048×2048"),
    (prompt, {"atten_mask": lambda: on(2048, 2048)}, "bool, int8 or uint8"),
    (prompt, {"atten_mask": lambda: on(2048, 2048, dtype=torch.bool)}, "not the triangle"),
    (prompt, {"sparse_mode": 5}, "0 to 4"),
    (prompt, {"sparse_mode": 4, "pre_tokens": -3, "next_tokens": 0}, "empty band"),
    (prompt, {"inner_precise": 4}, "inner_precise=4"),
    (decode8, {"key_antiquant_scale": None}, "alone"),
    (decode8, {"k": lambda: on(3, 32, 64)}, "without int8 keys"),
    (decode8, {"key_antiquant_mode": 1, "value_antiquant_mode": 1}, "antiquant mode 0"),
    (decode8, {"key_antiquant_scale": lambda: on(1, dtype=torch.float32)}, "query in"),
    (decode8, {"value_antiquant_scale": lambda: on(64)}, "models (1,)"),
    (decode8, {"k": lambda: on(3, 48, 64, dtype=torch.int8), "block_size": 48}, "multiples of 32"),
    (decode, {"k": lambda: on(3, 16, 64, dtype=torch.int8)}, "query in"),
    (prompt, {"k": lambda: on(3, 128, 64, dtype=torch.int8), "key_antiquant_scale": lambda: on(1),
              "value_antiquant_scale": lambda: on(1)}, "under several queries"),
    (mla, {"k": lambda: on(3, 16, 512, dtype=torch.int8), "key_antiquant_scale": lambda: on(1),
           "value_antiquant_scale": lambda: on(1)}, "MLA with antiquant"),
    (mla, {"key_rope": None}, "without key_rope"),
    (mla, {"k": lambda: on(3, 32, 512), "key_rope": lambda: on(3, 32, 64), "block_size": 32}, "16 or 128"),
    (mla, {"heads": 24}, "one of"),
    (mla, {"softmax_lse_flag": True}, "no LSE"),
    (mla, {"sparse_mode": 3}, "sparse_mode 3"),
    (mla, {"q": lambda: on(2, 32, 17, 512), "query_rope": lambda: on(2, 32, 17, 64)}, "at most 16"),
    (mla, {"query_rope": lambda: on(2, 32, 1, 32)}, "512 and 64"),
    (mla, {"k": lambda: on(3, 1, 32, 128, 16), "key_rope": lambda: on(3, 1, 4, 128, 16), "block_size": 128},
     "NZ under BNSD"),
    (mla_nz, {"k": lambda: on(3, 1, 32, 16, 16), "key_rope": lambda: on(3, 1, 4, 16, 16), "block_size": 16},
     "NZ with block_size=16"),
    (mla_nz, {"k": lambda: on(3, 1, 16, 128, 32), "key_rope": lambda: on(3, 1, 4, 128, 32)}, "[blocks, K, D/16"),
    (mla_nz, {"key_rope": lambda: on(3, 1, 8, 128, 8)}, "key_rope"),
    (prompt, {"k": lambda: on(3, 2, 2, 128, 16)}, "NZ without query_rope"),
    (mla, {"block_table": None, "block_size": 0, "k": lambda: on(2, 1, 16, 512)}, "without paging"),
    (mla, {"query_rope": lambda: on(1, 32, 1, 64)}, "differs from the query's"),
    (mla, {"num_key_value_heads": 2}, "one kv head"),
    (mla, {"input_layout": "TND", "q": lambda: on(2, 32, 512), "query_rope": lambda: on(2, 32, 64),
           "actual_seq_lengths": [1, 2]}, "MLA in TND"),
    (mla, {"atten_mask": lambda: on(2, 1, 1, 32, dtype=torch.bool)}, "takes no mask"),
    (mla, {"sparse_mode": 4}, "sparse_mode 4"),
    (decode, {"q": lambda: on(2, 4, 32)}, "3 dimensions in BNSD"),
    (decode, {"k": lambda: on(3, 1, 1, 16, 2, 32)}, "6 dimensions"),
    (decode, {"k": lambda: on(3, 4, 16, 32)}, "[blocks, K, N, D]"),
    (decode, {"q": lambda: on(65537, 1, 1, 16), "num_heads": 1, "num_key_value_heads": 1}, "1 to 65536"),
    (decode, {"atten_mask": lambda: on(2, 32, 1, 1, dtype=torch.bool)}, "(B, 1, 1, S) or (B, S)"),
    (decode, {"actual_seq_lengths_kv": [20, 262145], "block_size": 512, "k": lambda: on(3, 512, 64),
              "block_table": lambda: table(width=513)}, "262144 keys"),
    (prompt, {"actual_seq_lengths": []}, "as many query lengths"),
    (prompt, {"actual_seq_lengths": [3, 4]}, "beyond the query"),
    (prompt, {"actual_seq_lengths_kv": [3, 20971521], "block_table": lambda: table(width=163841)}, "at most 20971520"),
    (prompt, {"sparse_mode": 0}, "a whole mask"),
    (prompt, {"sparse_mode": 1, "atten_mask": None}, "1 without a mask"),
    (prompt, {"sparse_mode": 4, "atten_mask": None, "pre_tokens": 3, "next_tokens": 0}, "4 without a mask"),
    (prompt, {"sparse_mode": 2, "atten_mask": None}, "2 without a mask"),
    (dense, {"block_size": 16}, "without block_table"),
    (dense, {"v": lambda: on(2, 9, 2, 16)}, "differ"),
    (dense, {"k": lambda: on(2, 9, 64)}, "differ in dimensions"),
    (dense, {"k": lambda: on(2, 9, 4, 32)}, "key (2, 9, 4, 32)"),
    (dense, {"k": lambda: on(3, 9, 2, 32)}, "3 rows of keys"),
    (dense, {"actual_seq_lengths_kv": [3, 10]}, "beyond the keys"),
    (dense, {"input_layout": "TND", "q": lambda: on(6, 8, 192), "k": lambda: on(9, 8, 192), "num_heads": 8,
             "num_key_value_heads": 8, "actual_seq_lengths": [3, 6], "sparse_mode": 0, "atten_mask": None},
     "not modelled by the twin"),
]  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("make", "changes", "rule"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refused(make: Any, changes: dict[str, Any], rule: str, version: int) -> None:
    made = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(TwinRefusal, match=re.escape(rule)):
        call(version, *make(**made))


def test_a_large_cache_is_refused() -> None:
    huge = torch.empty(2**21 + 1, 16, 64, dtype=BF16, device="meta")  # beyond 2^31 elements
    from dougong_ascend.twin.fused_rules import Request, _paging

    given = dict(block_table=torch.zeros(1, 1, dtype=torch.int32), block_size=16, num_heads=4, num_key_value_heads=2)
    request = Request(1, huge, huge, huge, given, batch=1, dim=32, kv_lens=(3,))
    with pytest.raises(TwinRefusal, match="at most 2"):
        _paging(request)


def test_first_version_wants_more_latent_heads() -> None:
    call(2, *mla(heads=4))
    with pytest.raises(TwinRefusal, match="one of"):
        call(1, *mla(heads=4))


def tnd(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """A good call of two rows, one behind the other, for either version."""
    defaults = {
        "q": on(5, 8, 192), "k": on(3, 8, 128, 192), "input_layout": "TND", "block_size": 128, "sparse_mode": 3,
        "num_heads": 8, "num_key_value_heads": 8, "actual_seq_lengths": [2, 5], "actual_seq_lengths_kv": [3, 20],
        "atten_mask": causal_mask(torch.device("npu", 0)),
    }  # fmt: skip
    return decode(**(defaults | changes))


SMALL = {"q": lambda: on(5, 4, 128), "k": lambda: on(3, 128, 256), "num_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("versions", "changes", "rule"),
    [
        ((1, 2), {"actual_seq_lengths": None}, "prefix sums on the host"),
        ((1, 2), {"actual_seq_lengths": [3, 2]}, "do not fall"),
        ((1, 2), {"actual_seq_lengths": [2, 4]}, "end at 4"),
        ((1, 2), {"actual_seq_lengths_kv": [3]}, "per row"),
        ((1, 2), {"q": lambda: on(5, 8, 64), "k": lambda: on(3, 8, 128, 64)}, "192"),
        ((1, 2), {"sparse_mode": 2}, "0, 3 or 4"),
        ((1, 2), {"actual_seq_lengths_kv": [2, 20]}, "fewer queries than keys"),
        ((1, 2), {"q": lambda: on(5, 8, 192, dtype=torch.float16),
                  "k": lambda: on(3, 8, 128, 192, dtype=torch.float16)}, "bfloat16 only"),
        ((1,), SMALL, "TND with head dim 128: 192"),
        ((1,), {"k": lambda: on(3, 4, 128, 192), "num_key_value_heads": 4}, "8 over 4 heads: as many"),
        ((1,), {"q": lambda: on(65537, 1, 192), "num_heads": 1, "num_key_value_heads": 1,
                "actual_seq_lengths": [2, 65537]}, "at most 65536"),
        ((2,), {**SMALL, "q": lambda: on(4097, 4, 128), "actual_seq_lengths": list(range(1, 4098))}, "at most 4096"),
        ((2,), {**SMALL, "learnable_sink": lambda: on(4, dtype=torch.float32)}, "bfloat16"),
        ((2,), {**SMALL, "learnable_sink": lambda: on(3)}, "(N,)"),
        ((2,), {"learnable_sink": lambda: on(8)}, "head dim 192: at most 128"),
        ((1, 2), {"k": lambda: on(3, 8, 128, 192, dtype=torch.int8), "key_antiquant_scale": lambda: on(1),
                  "value_antiquant_scale": lambda: on(1)}, "TND with antiquant"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tnd(versions: tuple[int, ...], changes: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: value() if callable(value) else value for name, value in changes.items()}
    small = {name: value() if callable(value) else value for name, value in SMALL.items()}
    with pytest.raises(TwinRefusal, match="contradict"):
        call(2, *tnd())
    monkeypatch.setattr(settings, "tnd_paging", True)
    call(2, *tnd(**small, learnable_sink=on(4)))
    for version in versions:
        call(version, *tnd())
        with pytest.raises(TwinRefusal, match=re.escape(rule)):
            call(version, *tnd(**made))


def test_tnd_of_a_million_tokens() -> None:
    from dougong_ascend.twin.fused_rules import Request, _tnd

    q = torch.empty((1 << 20) + 1, 4, 128, dtype=BF16, device="meta")
    request = Request(2, q, q, q, dict(num_heads=4, num_key_value_heads=2), batch=1, dim=128)
    with pytest.raises(TwinRefusal, match="at most 1048576"):
        _tnd(request)


def test_a_cache_of_fewer_blocks_than_its_rows_name(monkeypatch: pytest.MonkeyPatch) -> None:
    few = decode(k=on(2, 16, 64), actual_seq_lengths_kv=[3, 20])
    call(1, *few)  # as vllm-ascend's rows with a common prefix do
    monkeypatch.setattr(settings, "own_blocks", True)
    call(1, *decode())
    with pytest.raises(TwinRefusal, match="2 blocks for rows of 3 together"):
        call(1, *few)


def test_sinks_want_tnd() -> None:
    with pytest.raises(TwinRefusal, match="TND only"):
        call(2, *decode(learnable_sink=on(4)))


SCATTER: list[tuple[dict[str, Any], str]] = [
    ({"slots": [0, -1, 3]}, "slots from -1"),
    ({"slots": [0, 48, 3]}, "0 to 47"),
    ({"slots": [5, 1, 5]}, "stands twice"),
    ({"slot_dtype": torch.float32}, "int32 or int64"),
    ({"slots": [0, 1]}, "slots, 3 tokens"),
    ({"k": torch.zeros(3, 2, 64, dtype=BF16)[..., ::2]}, "not contiguous"),
    ({"k": torch.zeros(3, 2, 32, dtype=torch.float16)}, "dtypes differ"),
    ({"k": torch.zeros(3, 1, 32, dtype=BF16)}, "tokens or heads"),
    ({"mode": "PA_NZ"}, "in mode PA_NZ"),
    ({"mode": "nd"}, "cache_mode"),
    ({"cache": torch.zeros(3, 16, 2, 16, dtype=BF16)}, "a cache"),
    ({"cache": torch.zeros(3, 16, 64, dtype=BF16)}, "four dimensions"),
    ({"k": torch.zeros(3, 64, dtype=BF16)}, "three dimensions"),
]


@pytest.mark.parametrize(("changes", "rule"), SCATTER, ids=[rule for _, rule in SCATTER])
def test_writes(changes: dict[str, Any], rule: str) -> None:
    k = changes.get("k", torch.zeros(3, 2, 32, dtype=BF16))
    strides, k = k.stride(), k.to("npu")
    if not changes.get("k", k).is_contiguous():
        k = torch.zeros(512, dtype=BF16, device="npu").as_strided((3, 2, 32), strides)
    v, cache = on(3, 2, 32), changes.get("cache", torch.zeros(3, 16, 2, 32, dtype=BF16)).to("npu")
    slots = torch.tensor(changes.get("slots", [0, 1, 2]), dtype=changes.get("slot_dtype", torch.int64), device="npu")
    with pytest.raises(TwinRefusal, match=rule):
        torch.ops.npu.npu_scatter_pa_kv_cache(
            k, v, cache, on(3, 16, 2, 32), slots, cache_mode=changes.get("mode", "Norm")
        )


def test_schemas_are_the_real_ones() -> None:
    q, k, _, arguments = decode()
    with pytest.raises(RuntimeError, match="num_head"):
        torch.ops.npu.npu_fused_infer_attention_score(q, k, k, num_head=4)
    with pytest.raises(RuntimeError, match="actual_seq_lengths_kv"):
        torch.ops.npu.npu_fused_infer_attention_score(q, k, k, **(arguments | {"actual_seq_lengths_kv": torch.ones(2)}))


@pytest.mark.parametrize(
    ("op", "arguments", "rule"),
    [
        ("npu_rms_norm", lambda: (on(3, 32), on(32, dtype=torch.float32)), "gamma in"),
        ("npu_rms_norm", lambda: (on(3, 32), on(16)), "gamma"),
        ("npu_rms_norm", lambda: (on(3, 64)[:, ::2], on(32)), "not contiguous"),
        ("npu_rms_norm", lambda: (on(3, 32, dtype=torch.float64), on(32, dtype=torch.float64)), "float32"),
        ("npu_rotary_mul", lambda: (on(3, 2, 32), on(1, 3, 1, 32), on(1, 3, 1, 32)), "four dimensions"),
        ("npu_rotary_mul", lambda: (on(1, 3, 2, 896), on(1, 3, 1, 896), on(1, 3, 1, 896)), "below 896"),
        ("npu_rotary_mul", lambda: (on(1, 3, 2, 32), on(1, 3, 1, 16), on(1, 3, 1, 16)), "r1"),
        ("npu_rotary_mul", lambda: (on(1, 3, 1000, 32), on(1, 3, 1, 32), on(1, 3, 1, 32)), "below 1000"),
        ("npu_swiglu", lambda: (on(3, 33),), "even"),
        ("npu_swiglu", lambda: (on(3, 32, dtype=torch.int32),), "floats"),
        ("npu_rms_norm", lambda: (on(0, 32), on(32)), "empty"),
        ("npu_gemma_rms_norm", lambda: (on(3, 32), on(32, dtype=torch.float32)), "gamma in"),
        ("npu_add_rms_norm", lambda: (on(3, 32), on(2, 32), on(32)), "both addends alike"),
        ("npu_add_rms_norm", lambda: (on(3, 32), on(3, 32), on(16)), "gamma"),
        ("npu_rotary_mul", lambda: (on(1, 3, 2, 31), on(1, 3, 1, 31), on(1, 3, 1, 31)), "even"),
        ("npu_rotary_mul", lambda: (on(1, 3, 2, 32), on(1, 3, 1, 32, dtype=torch.float32),
                                    on(1, 3, 1, 32, dtype=torch.float32)), "one dtype"),
        ("npu_rotary_mul", lambda: (on(1000, 1, 1, 32), on(1, 1, 1, 32), on(1, 1, 1, 32)), "below 1000"),
        ("npu_rotary_mul", lambda: (on(600, 1, 2, 32), on(1, 1, 1, 32), on(1, 1, 1, 32), "interleave"), "B·N"),
        ("npu_rotary_mul", lambda: (on(2, 3, 2, 32), on(2, 3, 1, 32), on(2, 3, 1, 32), "interleave"), "r1"),
        ("npu_rotary_mul", lambda: (on(1, 3, 2, 32), on(1, 3, 1, 32), on(1, 3, 1, 32), "quarter"), "rotary_mode"),
        ("npu_format_cast", lambda: (on(3, 32), 3), "format 3"),
        ("npu_format_cast", lambda: (on(3, 33), 29), "no tile"),
    ],
)  # fmt: skip
def test_other_operators(op: str, arguments: Any, rule: str) -> None:
    with pytest.raises(TwinRefusal, match=rule):
        getattr(torch.ops.npu, op)(*arguments())


def test_what_a_graph_refuses() -> None:
    """No wait and no task group outside a capture, and a captured call owns its workspace."""
    npu: Any = torch.get_device_module("npu")
    with pytest.raises(TwinRefusal, match="wait for ever"):
        npu.ExternalEvent().wait(npu.current_stream())
    with pytest.raises(TwinRefusal, match="no capture is under way"):
        npu.graph_task_group_begin(npu.current_stream())
    q, k, _, arguments = decode()
    graph = npu.NPUGraph()
    graph.capture_begin()
    try:
        with pytest.raises(TwinRefusal, match="a workspace of its own"):
            torch.ops.npu.npu_fused_infer_attention_score.out(
                q, k, k, **arguments, attention_out=torch.empty_like(q), softmax_lse=on(1, dtype=torch.float32)
            )
    finally:
        graph.capture_end()


def test_outputs_that_do_not_fit() -> None:
    q, k, _, arguments = decode(softmax_lse_flag=True)
    sums = on(2, 4, 1, 1, dtype=torch.float32)
    for out, lse, rule in (
        (on(2, 4, 1, 16), sums, "attention_out (2, 4, 1, 16)"), (q.to(torch.float16), sums, "attention_out's dtype"),
        (torch.empty_like(q), on(2, 4, dtype=torch.float32), "softmax_lse (2, 4)"),
        (torch.empty_like(q), on(2, 4, 1, 1), "softmax_lse's dtype"),
    ):  # fmt: skip
        with pytest.raises(TwinRefusal, match=re.escape(rule)):
            torch.ops.npu.npu_fused_infer_attention_score.out(q, k, k, **arguments, attention_out=out, softmax_lse=lse)
