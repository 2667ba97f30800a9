"""Registration, translation of batches, and refusals, against a stand-in of SGLang 0.5.17 on the CPU.

What ran inside SGLang itself, on a GPU, is in the README.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import dougong_sglang
import pytest
import sglang_host as host
import torch

H, K, D = 4, 2, 32
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])


def make(monkeypatch: pytest.MonkeyPatch, page: int, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    """(backend, pool, req_to_token): three requests of up to 64 tokens, the third shares 16 tokens with the first."""
    registered = host.install(monkeypatch)
    dougong_sglang.register()
    order = torch.randperm(192 // page - 1, generator=torch.Generator().manual_seed(1))[: 3 * 64 // page - 1] + 1
    order = torch.cat((order, order.new_tensor([192 // page])))
    table = (order[:, None] * page + torch.arange(page)).reshape(3, 64).int()
    table[2, :16] = table[0, :16]
    pool = options.pop("pool", None) or host.MHATokenToKVPool(192 + page, K, D)
    return registered["backends"]["dougong"](host.runner(pool, table, page, **options)), pool, table


class TestRegistration:
    def test_it_is_a_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registered = host.install(monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dougong_sglang.register()
            dougong_sglang.register()
        assert list(registered["backends"]) == ["dougong"]
        assert registered["choices"] == ["triton", "dougong"]

    def test_another_version_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch, version="0.6.1")
        with pytest.warns(UserWarning, match=r"written against SGLang 0\.5\.17; this is 0\.6\.1"):
            dougong_sglang.register()

    def test_an_sglang_without_the_registry_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registered = host.install(monkeypatch, registry=False)
        with pytest.warns(UserWarning, match="no registry of attention backends"):
            dougong_sglang.register()
        assert registered["choices"] == ["triton"]

    def test_importing_the_plugin_imports_next_to_nothing(self) -> None:
        code = "import sys, dougong_sglang; assert not {'torch', 'sglang', 'dougong'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"mla": True}, "MLA models"),
            ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
            ({"kv_cache_dtype": "fp8_e5m2"}, "does not support --kv-cache-dtype fp8_e5m2"),
            ({"enable_deterministic_inference": True}, "deterministic"),
            ({"dcp_size": 2}, "decode context parallelism"),
            ({"attn_cp_size": 2}, "context parallel prompts"),
            ({"enable_prefill_cp": True}, "context parallel prompts"),
            ({"pool": type("SWAKVPool", (), {})()}, "KV pools of the kind SWAKVPool"),
            ({"pool": type("MHATokenToKVPool", (), {"kv_cache_layout": "hnd"})()}, "lie as hnd"),
            ({"allocator": SimpleNamespace(translate_kv_loc=len)}, "unified memory pool"),
        ],
    )
    def test_a_runner_is_refused(self, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=words):
            make(monkeypatch, 16, **options)

    @pytest.mark.parametrize(
        ("options", "given", "words"),
        [
            ({"is_cross_attention": True}, {}, "cross attention"),
            ({"attn_type": "encoder_only"}, {}, "attention type encoder_only"),
            ({"logit_capping_method": "other", "logit_cap": 5.0}, {}, "logit capping by other"),
            ({"k_scale": torch.ones(1)}, {}, "cache scales"),
            ({}, {"score_mod": lambda s: s}, "score_mod"),
        ],
    )
    def test_a_layer_is_refused(
        self, options: dict[str, Any], given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend, _, table = make(monkeypatch, 16)
        batch = host.forward([0], [2], [2], table, decode=False)
        backend.init_forward_metadata(batch)
        q, k, v = torch.zeros(2, H * D), torch.zeros(2, K, D), torch.zeros(2, K, D)
        with pytest.raises(ValueError, match=words):
            backend.forward_extend(q, k, v, host.layer(H, K, D, **options), batch, **given)


def reference(
    q: torch.Tensor, history: list[Any], q_lens: list[int], layer: Any, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain attention, row by row, in float64; a window of w shows the query's token and w before it."""
    out, at = [], 0
    for (k, v), count in zip(history, q_lens, strict=True):
        for j in range(count):
            position = k.shape[0] - count + j
            low = max(0, position - layer.sliding_window_size) if layer.sliding_window_size > -1 else 0
            keys, values = (x[low : position + 1].double().repeat_interleave(H // K, 1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[at + j].double(), keys) * layer.scaling
            if layer.logit_cap:
                scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
            weights = scores.exp()
            total = weights.sum(-1) + (0 if sinks is None else sinks.double().exp())
            out.append(torch.einsum("hn,nhd->hd", weights / total[:, None], values))
        at += count
    return torch.stack(out).float()


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        ({}, None),
        ({"sliding_window_size": 9}, None),
        ({"logit_cap": 2.0}, None),
        ({"v_head_dim": 16}, None),
        ({"v_head_dim": 48}, None),
        ({}, SINKS),
        ({"sliding_window_size": 9, "logit_cap": 2.0, "v_head_dim": 16}, SINKS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_a_server(
    page: int, options: dict[str, Any], sinks: torch.Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, a chunk mixed with a decode, a prompt whose front is cached, decodes: all over one pool."""
    torch.manual_seed(0)
    layer = host.layer(H, K, D, **options)
    dims = D, D, layer.v_head_dim
    backend, _, table = make(monkeypatch, page, pool=host.MHATokenToKVPool(192 + page, K, *dims[1:], dtype))
    given = {} if sinks is None else {"sinks": sinks.to(dtype)}  # a weight as the others
    history: dict[int, Any] = {}

    def step(rows: list[int], q_lens: list[int], decode: bool = False) -> None:
        q, k, v = (torch.randn(sum(q_lens), n, dim).to(dtype) for n, dim in zip((H, K, K), dims, strict=True))
        at = 0
        for row, count in zip(rows, q_lens, strict=True):
            old = history.get(row, (k[:0], v[:0]))
            history[row] = tuple(torch.cat((x, y[at : at + count])) for x, y in zip(old, (k, v), strict=True))
            at += count
        batch = host.forward(rows, q_lens, [history[row][0].shape[0] for row in rows], table, decode)
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if decode else backend.forward_extend
        out = run(q.reshape(len(q), H * D), k, v, layer, batch, **given)
        assert out.dtype is dtype
        want = reference(q, [history[row] for row in rows], q_lens, layer, sinks)
        rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (2e-2, 2e-3)
        torch.testing.assert_close(out.float().view(want.shape), want, rtol=rtol, atol=atol)

    step([0, 1], [20, 5])
    step([1, 0], [11, 1])  # SGLang's mixed batches: chunks first, decodes last
    history[2] = tuple(x[:16] for x in history[0])
    step([2], [6])
    step([0, 1, 2], [1, 1, 1], decode=True)


def test_a_graph_is_refused_where_the_kernel_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, table = make(monkeypatch, 16)
    backend.init_cuda_graph_state(3, 3)
    batch = host.forward([0], [1], [1], table, decode=True)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    q, k, v = torch.zeros(1, H * D), torch.zeros(1, K, D), torch.zeros(1, K, D)
    with pytest.raises(ValueError, match="--disable-cuda-graph"):
        backend.forward_decode(q, k, v, host.layer(H, K, D), batch)


@pytest.mark.parametrize("whole_table", [True, False])
def test_a_replay_reads_the_captured_addresses(whole_table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that says it can be captured: the step is refreshed in place, and gives the new batch's result."""
    torch.manual_seed(0)
    backend, pool, table = make(monkeypatch, 16)
    module = sys.modules["dougong_sglang.backend"]
    original = module.attention_kernel

    def captured(*args: Any, **kwargs: Any) -> Any:
        kernel, declared = original(*args, **kwargs)
        return kernel, dataclasses.replace(declared, graph="capture")

    monkeypatch.setattr(module, "attention_kernel", captured)
    if not whole_table:
        monkeypatch.setattr(module, "_SMALL_TABLE", 0)
    pool.k, pool.v = torch.randn_like(pool.k), torch.randn_like(pool.v)
    backend.init_cuda_graph_state(3, 3)
    layer = host.layer(H, K, D)
    warm = host.forward([0, 0], [1, 1], [1, 1], table, decode=True)
    backend.init_forward_metadata_out_graph(warm, in_capture=True)
    q = torch.randn(2, H * D)
    backend.forward_decode(q, None, None, layer, warm, save_kv_cache=False)
    address = backend.step.batch.groups[0].block_table.data_ptr()
    batch = host.forward([2, 1], [1, 1], [40, 7], table, decode=True)
    backend.init_forward_metadata_out_graph(batch)
    assert backend.step.batch.groups[0].block_table.data_ptr() == address
    out = backend.forward_decode(q, None, None, layer, batch, save_kv_cache=False)
    history = [(pool.k[table[row, :n]], pool.v[table[row, :n]]) for row, n in ((2, 40), (1, 7))]
    want = reference(q.view(2, H, D), history, [1, 1], layer)
    torch.testing.assert_close(out.view(2, H, D), want, rtol=1e-4, atol=1e-4)


def test_queries_behind_the_batch_are_answered_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, table = make(monkeypatch, 16)
    batch = host.forward([0], [2], [2], table, decode=False)
    backend.init_forward_metadata(batch)
    q, k, v = torch.randn(5, H * D), torch.randn(2, K, D), torch.randn(2, K, D)
    out = backend.forward_extend(q, k, v, host.layer(H, K, D), batch)
    want = reference(q.view(5, H, D), [(k, v)], [2], host.layer(H, K, D))
    torch.testing.assert_close(out[:2].view(2, H, D), want, rtol=1e-4, atol=1e-4)
    assert not out[2:].any()


def test_lengths_that_the_host_does_not_have_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _, table = make(monkeypatch, 16)
    module = sys.modules["dougong_sglang.backend"]
    original = module.attention_kernel

    def wanting(*args: Any, **kwargs: Any) -> Any:
        kernel, declared = original(*args, **kwargs)
        return kernel, dataclasses.replace(declared, needs_host_lengths=True)

    monkeypatch.setattr(module, "attention_kernel", wanting)
    batch = host.forward([0], [2], [2], table, decode=False)
    q, k, v = torch.zeros(2, H * D), torch.zeros(2, K, D), torch.zeros(2, K, D)
    backend.init_forward_metadata(batch)
    backend.forward_extend(q, k, v, host.layer(H, K, D), batch)
    batch.seq_lens_cpu = None
    backend.init_forward_metadata(batch)
    with pytest.raises(ValueError, match="SGLang keeps none for this batch"):
        backend.forward_extend(q, k, v, host.layer(H, K, D), batch)
