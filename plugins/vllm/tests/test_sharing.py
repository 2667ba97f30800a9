"""Decode context parallelism: two ranks, each with half of every sequence, against plain attention."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import host
import pytest
import torch

BLOCK, H, D, WORLD = 16, 4, 32, 2


def load(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    host.install(monkeypatch, dtype=dtype)
    return SimpleNamespace(**{name: importlib.import_module(f"dougong_vllm.{name}") for name in ("builder", "impl")})


class Rank:
    """What vLLM gives one rank: a share of the cache, its heads' queries, all keys of the step."""

    def __init__(self, parts: Any, group: host.Group, interleave: int, graph: bool, dtype: torch.dtype) -> None:
        host.here.group = group
        self.group, self.interleave, self.graph = group, interleave, graph
        self.impl = parts.impl.DougongAttentionImpl(H, D, D**-0.5, 1)
        vllm, spec = host.config({"layer": self.impl}, dtype=dtype)
        vllm.parallel_config.cp_kv_cache_interleave_size = interleave
        self.builder = parts.builder.DougongMetadataBuilder(spec, ["layer"], vllm, torch.device("cpu"))
        self.cache = torch.full((12, BLOCK, 1, 2 * D), float("nan"), dtype=dtype).transpose(1, 2)

    def slot(self, table: torch.Tensor, position: int) -> int:
        """A token's place in this rank's cache; -1 where it is another's."""
        run, within = divmod(position, self.interleave)
        if run % WORLD != self.group.rank_in_group:
            return -1
        local = run // WORLD * self.interleave + within
        return int(table[local // BLOCK]) * BLOCK + local % BLOCK

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: list[int], kv_lens: list[int], tables: Any
    ) -> torch.Tensor:
        host.here.group = self.group
        starts = torch.zeros(len(q_lens) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(q_lens).cumsum(0)
        slots = [
            self.slot(table, position)
            for table, count, length in zip(tables, q_lens, kv_lens, strict=True)
            for position in range(length - count, length)
        ]
        lengths = torch.tensor(kv_lens, dtype=torch.int32)
        common = host.Common(
            query_start_loc=starts.clone(), query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=len(q_lens),
            num_actual_tokens=sum(q_lens), max_query_len=max(q_lens), max_seq_len=max(kv_lens),
            block_table_tensor=tables, slot_mapping=torch.tensor(slots), seq_lens_cpu_upper_bound=lengths,
        )  # fmt: skip
        if self.graph:
            metadata = self.builder.build_for_cudagraph_capture(common)
        else:
            metadata = self.builder.build(0, common)
        out = torch.full((sum(q_lens), H * D), 7.0, dtype=q.dtype)
        self.impl.forward(SimpleNamespace(), q, k, v, self.cache, metadata, out)
        return out.view(-1, H, D)


def plain(q: torch.Tensor, history: list[tuple[torch.Tensor, torch.Tensor]], q_lens: list[int]) -> torch.Tensor:
    out, at = [], 0
    for (k, v), count in zip(history, q_lens, strict=True):
        for j in range(count):
            end = k.shape[0] - count + j + 1
            scores = torch.einsum("hd,nd->hn", q[at + j].double(), k[:end, 0].double()) * D**-0.5
            out.append(scores.softmax(-1) @ v[:end, 0].double())
        at += count
    return torch.stack(out).float()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("interleave", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks_answer_as_one(
    interleave: int, graph: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts without a context, a decode beside a chunk, decodes; one sequence so short that a rank has none of it."""
    torch.manual_seed(0)
    parts = load(monkeypatch, dtype)
    barrier, board = threading.Barrier(WORLD, timeout=60), [None] * WORLD
    tables = torch.tensor([[3, 7], [5, 2], [8, 1]], dtype=torch.int32)
    history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ThreadPoolExecutor(WORLD) as pool:
        groups = [host.Group(WORLD, rank, barrier, board) for rank in range(WORLD)]
        ranks = [pool.submit(Rank, parts, group, interleave, graph, dtype).result() for group in groups]

        def step(rows: list[int], q_lens: list[int]) -> None:
            q, k, v = (torch.randn(sum(q_lens), heads, D).to(dtype) for heads in (WORLD * H, 1, 1))
            at = 0
            for row, count in zip(rows, q_lens, strict=True):
                old = history.get(row, (k[:0], v[:0]))
                history[row] = tuple(torch.cat((x, y[at : at + count])) for x, y in zip(old, (k, v), strict=True))  # type: ignore[assignment]
                at += count
            kv_lens = [history[row][0].shape[0] for row in rows]
            heads = q.split(H, 1)
            answers = [
                pool.submit(rank.step, mine, k, v, q_lens, kv_lens, tables[rows])
                for rank, mine in zip(ranks, heads, strict=True)
            ]
            found = torch.cat([answer.result(60) for answer in answers], 1)
            want = plain(q, [history[row] for row in rows], q_lens)
            rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (2e-2, 5e-3)
            torch.testing.assert_close(found.float(), want, rtol=rtol, atol=atol)

        step([0, 1, 2], [20, 5, 1])
        assert {group.gathers > 0 for group in groups} == {graph}, "no rank has a context: nothing to gather"
        step([0, 1, 2], [1, 11, 1])
        step([0, 1, 2], [1, 1, 1])
    assert not any(rank.cache[[4, 6, 9, 10, 11]].isfinite().any() for rank in ranks), "blocks of nobody were written"


@pytest.mark.parametrize(
    ("heads", "options", "words"),
    [
        (1, {"sliding_window": 9}, "a sliding window"),
        (1, {"alibi_slopes": [1.0] * H}, "ALiBi"),
        (1, {"sinks": torch.zeros(H)}, "attention sinks"),
        (1, {"kv_sharing_target_layer_name": "x"}, "the cache of another layer"),
        (2, {}, "2 kv heads per rank"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    heads: int, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load(monkeypatch)
    monkeypatch.setattr(host.here, "group", host.Group(2, 0, threading.Barrier(1), [None]), raising=False)
    with pytest.raises(NotImplementedError, match=f"{words} with decode_context_parallel_size=2"):
        parts.impl.DougongAttentionImpl(H, D, D**-0.5, heads, **options)
