"""Registration, translation of batches, and refusals, against a stand-in of vLLM 0.26 on the CPU.

What ran inside vLLM itself, on a GPU, is in the README.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any, ClassVar

import dougong_vllm
import host
import pytest
import torch

BLOCK, H, K, D = 16, 4, 2, 32
SLOPES = [0.5, 0.25, 0.125, 0.0625]
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])


def load(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    host.install(monkeypatch, dtype=dtype)
    return SimpleNamespace(**{name: importlib.import_module(f"dougong_vllm.{name}") for name in
                              ("backend", "builder", "impl", "batch")})  # fmt: skip


class TestRegistration:
    def test_it_takes_the_place_for_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dougong_vllm.register()
            dougong_vllm.register()
        path = host.Place.CUSTOM.get_path()
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).get_name() == "CUSTOM"

    def test_another_version_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch, version="0.31.2")
        with pytest.warns(UserWarning, match=r"written against vLLM 0\.26; this is 0\.31\.2"):
            dougong_vllm.register()
        assert host.OVERRIDES

    def test_another_plugin_keeps_its_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch)
        host.OVERRIDES[host.Place.CUSTOM] = "other.Backend"
        with pytest.warns(UserWarning, match=r"other\.Backend is registered as CUSTOM already"):
            dougong_vllm.register()
        assert host.Place.CUSTOM.get_path() == "other.Backend"

    def test_a_vllm_without_the_place_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch, AttentionBackendEnum=SimpleNamespace())
        with pytest.warns(UserWarning, match="no place for an attention backend"):
            dougong_vllm.register()

    def test_importing_the_plugin_imports_next_to_nothing(self) -> None:
        code = "import sys, dougong_vllm; assert not {'torch', 'vllm', 'dougong'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestSelection:
    ASK: ClassVar[dict[str, Any]] = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
    }

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({}, None),
            ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
            ({"kv_cache_dtype": "bfloat16"}, None),
            ({"kv_cache_dtype": "float16"}, "a KV cache in torch.float16 beside a model in torch.bfloat16"),
            ({"head_size": 512}, "head_size"),
            ({"use_mla": True}, "MLA"),
            ({"attn_type": host.AttentionType.ENCODER_ONLY}, "attention type"),
            ({"non_causal": True}, "non_causal"),
            ({"mm_prefix": True}, "mm_prefix"),
            ({"batch_invariance": True}, "batch_invariance"),
        ],
    )
    def test_what_the_backend_lacks_is_refused(
        self, change: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reasons = load(monkeypatch).backend.DougongAttentionBackend.validate(**{**self.ASK, **change})
        assert (words is None and not reasons) or any(words in reason for reason in reasons), reasons

    def test_kernels_are_asked_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = load(monkeypatch)
        sys.modules["vllm.platforms"].current_platform = SimpleNamespace(device_type="xpu")  # type: ignore[attr-defined]
        (reason,) = parts.backend.DougongAttentionBackend.validate(**self.ASK)
        assert "no backend for tensors on 'xpu'" in reason

    def test_graph_support_is_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = load(monkeypatch)
        _, spec = host.config({})
        support = parts.builder.DougongMetadataBuilder.get_cudagraph_support(None, spec)
        assert support is host.AttentionCGSupport.NEVER  # the CPU's kernel records no graphs

    @pytest.mark.parametrize(
        ("graph", "batches", "name"),
        [("none", "any", "NEVER"), ("update", "any", "NEVER"), ("capture", "any", "UNIFORM_BATCH"),
         ("capture", "decode", "UNIFORM_SINGLE_TOKEN_DECODE")],
    )  # fmt: skip
    def test_graph_support_of_other_kernels(
        self, graph: str, batches: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = load(monkeypatch)
        declared = SimpleNamespace(graph=graph, graph_batches=batches)
        monkeypatch.setattr(parts.builder, "_declared", lambda spec, config: declared)
        support = parts.builder.DougongMetadataBuilder.get_cudagraph_support(None, None)
        assert support.name == name

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"attn_type": host.AttentionType.ENCODER_ONLY}, "decoders"),
            ({"use_alibi_sqrt": True}, "square roots"),
            ({"chunk_lookback": 3}, "chunk_lookback"),
        ],
    )
    def test_a_layer_is_refused(self, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(NotImplementedError, match=words):
            load(monkeypatch).impl.DougongAttentionImpl(H, D, D**-0.5, K, **options)


def common_of(q_lens: list[int], kv_lens: list[int], tables: torch.Tensor, pad_rows: int = 0, pad: int = 0) -> Any:
    """What vLLM's model runner makes: rows and tokens may be padded, padded tokens have slot -1."""
    starts = torch.zeros(len(q_lens) + pad_rows + 1, dtype=torch.int32)
    starts[1 : len(q_lens) + 1] = torch.tensor(q_lens).cumsum(0)
    starts[len(q_lens) + 1 :] = sum(q_lens)
    slots = [
        int(tables[row, p // BLOCK]) * BLOCK + p % BLOCK
        for row, (q, kv) in enumerate(zip(q_lens, kv_lens, strict=True))
        for p in range(kv - q, kv)
    ]
    full = torch.zeros(len(q_lens) + pad_rows, tables.shape[1], dtype=torch.int32)
    full[: len(q_lens)] = tables
    return host.Common(
        query_start_loc=starts.clone(), query_start_loc_cpu=starts,
        seq_lens=torch.tensor([*kv_lens, *[0] * pad_rows], dtype=torch.int32), num_reqs=len(q_lens) + pad_rows,
        num_actual_tokens=sum(q_lens) + pad, max_query_len=max(q_lens), max_seq_len=max(kv_lens),
        block_table_tensor=full, slot_mapping=torch.tensor([*slots, *[-1] * pad]),
    )  # fmt: skip


def reference(
    q: torch.Tensor, history: list[tuple[torch.Tensor, torch.Tensor]], q_lens: list[int], asked: dict[str, Any]
) -> torch.Tensor:
    """Plain attention, row by row, in float64, of a layer of the options ``asked``."""
    window, cap, sinks = (asked.get(name) for name in ("sliding_window", "logits_soft_cap", "sinks"))
    slopes = torch.tensor(asked.get("alibi_slopes", [0.0] * H)).double()
    out, at = [], 0
    for (k, v), count in zip(history, q_lens, strict=True):
        for j in range(count):
            position = k.shape[0] - count + j
            low = max(0, position - window + 1) if window else 0
            keys, values = (x[low : position + 1].double().repeat_interleave(H // K, 1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[at + j].double(), keys) * D**-0.5
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = (scores + slopes[:, None] * (torch.arange(low, position + 1) - position)).exp()
            total = weights.sum(-1) + (0 if sinks is None else sinks.double().exp())
            out.append(torch.einsum("hn,nhd->hd", weights / total[:, None], values))
        at += count
    return torch.stack(out).float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 9},
        {"logits_soft_cap": 2.0},
        {"alibi_slopes": SLOPES},
        {"sinks": SINKS},
        {"alibi_slopes": SLOPES, "sinks": SINKS, "sliding_window": 9, "logits_soft_cap": 2.0},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strides", ["NHD", "HND"])
@pytest.mark.parametrize("graph", [False, True])
def test_steps_of_a_server(
    options: dict[str, Any], dtype: torch.dtype, strides: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, a chunk beside decodes, a prefix-cached prompt, decodes padded for a graph: all over one cache."""
    torch.manual_seed(0)
    parts = load(monkeypatch, dtype)
    loaded = {name: x.to(dtype) if name == "sinks" else x for name, x in options.items()}  # a weight as the others
    impl = parts.impl.DougongAttentionImpl(H, D, D**-0.5, K, **loaded)
    vllm, spec = host.config({"layer": impl}, dtype=dtype)
    builder = parts.builder.DougongMetadataBuilder(spec, ["layer"], vllm, torch.device("cpu"))
    shape = (12, K, BLOCK, 2 * D) if strides == "HND" else (12, BLOCK, K, 2 * D)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    cache = cache if strides == "HND" else cache.transpose(1, 2)
    tables = torch.tensor([[3, 7, 1], [5, 2, 9], [3, 8, 4]])  # the third shares the first one's first block
    history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(rows: list[int], q_lens: list[int], pad_rows: int = 0, pad: int = 0) -> None:
        new = sum(q_lens)
        q, k, v = (torch.randn(new + pad, heads, D).to(dtype) for heads in (H, K, K))
        at = 0
        for row, count in zip(rows, q_lens, strict=True):
            old = history.get(row, (k[:0], v[:0]))
            history[row] = tuple(torch.cat((x, y[at : at + count])) for x, y in zip(old, (k, v), strict=True))  # type: ignore[assignment]
            at += count
        kv_lens = [history[row][0].shape[0] for row in rows]
        common = common_of(q_lens, kv_lens, tables[rows], pad_rows, pad)
        build = builder.build_for_cudagraph_capture if graph else lambda common: builder.build(0, common)
        metadata = build(common)
        assert metadata.slots.min() >= 0
        output = torch.full((new + pad, H * D), 7.0, dtype=dtype)
        impl.forward(SimpleNamespace(), q, k, v, cache, metadata, output)
        want = reference(q, [history[row] for row in rows], q_lens, options)
        rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (2e-2, 2e-3)
        torch.testing.assert_close(output[:new].view(new, H, D).float(), want, rtol=rtol, atol=atol)

    step([0, 1], [20, 5])  # two prompts
    step([0, 1], [1, 11])  # a decode beside the rest of a prompt in chunks
    history[2] = tuple(x[:16] for x in history[0])  # type: ignore[assignment]
    step([0, 1, 2], [1, 1, 6])  # the third's first block comes from the prefix cache
    step([0, 1, 2], [1, 1, 1], pad_rows=1, pad=5)  # padded to a graph's sizes
    assert not cache[[6, 10, 11]].isfinite().any(), "blocks of nobody were written"


def test_a_graph_keeps_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load(monkeypatch)
    impl = parts.impl.DougongAttentionImpl(H, D, D**-0.5, K)
    vllm, spec = host.config({"layer": impl})
    builder = parts.builder.DougongMetadataBuilder(spec, ["layer"], vllm, torch.device("cpu"))
    tables = torch.tensor([[1, 2], [3, 4]])
    captured = builder.build_for_cudagraph_capture(common_of([1, 1], [3, 9], tables))
    replayed = builder.build(0, common_of([1, 1], [30, 11], tables))
    eager = builder.build(0, common_of([1, 4], [30, 11], tables))
    assert replayed.kinds is captured.kinds
    assert eager.kinds is not captured.kinds
    bounds = [one.batch.groups[0].max_kv_len for one in (captured, replayed, eager)]
    assert bounds == [builder.limits.max_kv_len, builder.limits.max_kv_len, 30]
    assert replayed.slots.data_ptr() == captured.slots.data_ptr()


@pytest.mark.parametrize(
    "q_lens", [[1], [1, 1, 1], [1, 1, 0, 0], [0, 0], [1, 0, 1], [1, 1, 7], [1, 7, 1], [4, 4, 0], [4, 1], []]
)
def test_a_batch_is_counted_as_its_rows_say(q_lens: list[int]) -> None:
    from dougong_vllm.batch import to_batch

    rows = len(q_lens)
    common = common_of(q_lens or [0], [9] * max(rows, 1), torch.ones(max(rows, 1), 2))
    common.num_reqs = rows
    batch = to_batch(common, torch.zeros(sum(q_lens), dtype=torch.int64))
    decodes = next((row for row, count in enumerate(q_lens) if count != 1), rows)
    found = batch.num_rows, batch.num_tokens, batch.num_decode_rows, batch.max_q_len
    assert found == (rows, sum(q_lens), decodes, max(q_lens, default=0))
    assert batch.host_cu_q.tolist() == batch.cu_q.tolist() == [sum(q_lens[:row]) for row in range(rows + 1)]
    assert batch.groups[0].kv_len.shape == (rows,) and batch.groups[0].block_table.shape == (rows, 2)


def test_a_graph_is_not_captured_over_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load(monkeypatch)
    vllm, spec = host.config({"layer": parts.impl.DougongAttentionImpl(H, D, D**-0.5, K)})
    builder = parts.builder.DougongMetadataBuilder(spec, ["layer"], vllm, torch.device("cpu"))
    common = common_of([1], [5], torch.tensor([[1]]))
    common.seq_lens = common.seq_lens.long()
    assert builder.build(0, common).batch.groups[0].kv_len.dtype == torch.int32
    with pytest.raises(NotImplementedError, match="start with --enforce-eager"):
        builder.build_for_cudagraph_capture(common)


def test_negative_slots_go_to_the_null_block() -> None:
    from dougong_vllm.batch import without_negatives

    slots = torch.tensor([40, -1, -1, 33, -1])
    assert without_negatives(slots, torch.arange(5) % 16).tolist() == [40, 1, 2, 33, 4]


def test_layers_that_share_a_cache_do_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load(monkeypatch)
    impl = parts.impl.DougongAttentionImpl(H, D, D**-0.5, K, kv_sharing_target_layer_name="other")
    vllm, spec = host.config({"layer": impl})
    builder = parts.builder.DougongMetadataBuilder(spec, ["layer"], vllm, torch.device("cpu"))
    metadata = builder.build(0, common_of([2], [2], torch.tensor([[1]])))
    cache = torch.zeros(3, K, BLOCK, 2 * D)
    q, k, v = (torch.randn(2, heads, D) for heads in (H, K, K))
    impl.forward(SimpleNamespace(), q, k, v, cache, metadata, torch.zeros(2, H * D))
    assert not cache.any()
    assert impl.forward(SimpleNamespace(), q, k, v, cache, None, torch.ones(2, H * D)).eq(0).all()  # profiling
