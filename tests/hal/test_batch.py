"""What kernels are handed of a step."""

from __future__ import annotations

import itertools

import pytest
import torch

from dougong.hal import AttentionSpec, BatchView, LayerArgs


def sees(spec: AttentionSpec, queries: int, keys: int, query: int) -> bool:
    """The contract's first two rules, one key after another."""
    position = keys - queries + query
    for key in range(keys):
        behind = not spec.causal or key <= position
        near = spec.window is None or abs(position - key) < spec.window
        if behind and near:
            return True
    return False


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_nothing(causal: bool, window: int | None) -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16, causal=causal, window=window)
    rows = [(1, 0), (1, 4), *itertools.product(range(7), range(6))]
    q_lens, kv_lens = [q for q, _ in rows], [kv for _, kv in rows]
    table = torch.zeros(len(rows), 2, dtype=torch.int32)
    batch = BatchView.build(q_lens, kv_lens, table, 8, "cpu", slots=torch.arange(sum(q_lens)))
    expected = [not sees(spec, q, kv, query) for q, kv in rows for query in range(q)]
    assert any(expected) and not all(expected)
    assert batch.blind(spec, batch.groups[0].kv_len).tolist() == expected
    longer = torch.cat((batch.groups[0].kv_len, torch.zeros(3, dtype=torch.int32)))  # a buffer for the largest batch
    assert batch.blind(spec, longer).tolist() == expected
    decodes = BatchView.build([1, 1, 1], [3, 0, 1], table[:3], 8, "cpu", slots=torch.arange(3))
    assert decodes.blind(spec, decodes.groups[0].kv_len).tolist() == [False, True, False]


def test_where_the_lengths_lie_the_answer_lies() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16)
    batch = BatchView.build([3, 2], [2, 2], torch.zeros(2, 1, dtype=torch.int32), 8, "cpu")
    batch.cu_q = batch.cu_q.to("meta")
    host = batch.groups[0].host_kv_len
    assert host is not None
    assert batch.blind(spec, host).tolist() == [True, False, False, False, False]
    assert batch.blind(spec, host.to("meta")).device.type == "meta"


def test_scales_on_the_host_are_read_once() -> None:
    scale = torch.tensor([0.25])
    layer = LayerArgs(scale, 0.5)
    assert layer.host_scales == (0.25, 0.5)
    scale.fill_(9.0)
    assert layer.host_scales == (0.25, 0.5)
    assert LayerArgs().host_scales == (1.0, 1.0)
