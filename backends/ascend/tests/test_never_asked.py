"""The backend asks nothing that the operators refuse: random questions, each refused in ``supports`` or computed as the
contract says. The twin raises where an operator would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from ascend_cases import LATENT_SPEC, Scene, agree

import dougong_ascend
from dougong.hal import AttentionKernel, AttentionQuery, AttentionSpec, Backend, KVLayout, open_backend
from dougong.plugins import load_plugins
from dougong_ascend.attention import FusedAttention, GatheredAttention
from dougong_ascend.attention_310p import PagedAttention310P
from dougong_ascend.latent import LatentAttention, TiledLatentAttention
from dougong_ascend.layouts import HND_PAGED, LATENT, LATENT_NZ, NHD_PAGED, NZ
from dougong_ascend.twin import plugin
from dougong_ascend.twin.settings import settings

KINDS: dict[str, tuple[type[AttentionKernel], ...]] = {
    "Ascend910B1": (FusedAttention, GatheredAttention, LatentAttention, TiledLatentAttention),
    "Ascend310P3": (PagedAttention310P,),
}
LAYOUTS = (NHD_PAGED, HND_PAGED, LATENT, LATENT_NZ, NZ)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Question:
    """What a kernel may be asked, and a batch for it."""

    spec: AttentionSpec
    layout: KVLayout
    block: int
    q_lens: list[int]
    kv_lens: list[int]

    @staticmethod
    def random(seed: int, tiled: bool) -> Question:
        """Half of the draws keep to most limits (``tiled``: 310P's); the other half step over them here and there."""
        draw = Random(seed)
        bold = draw.random() < 0.5

        def one(good: tuple[Any, ...], bad: tuple[Any, ...] = ()) -> Any:
            return draw.choice(bad if bold and bad and draw.random() < 0.15 else good)

        latent = draw.random() < (0.02 if tiled else 0.3)
        dtype = one((torch.float16,) if tiled else DTYPES[:2], DTYPES)
        changes: dict[str, Any] = {
            "dtype": dtype,
            "kv_dtype": dtype,
            "causal": draw.random() < (0.95 if latent else 0.7),
        }
        for name, value in (("window", draw.choice((1, 7, 40, 130))), ("sinks", True), ("lse", True)):
            if draw.random() < (0.05 if latent or tiled else 0.3):
                changes[name] = value
        if bold and draw.random() < 0.1:
            changes |= {"softcap": 5.0} if draw.random() < 0.5 else {"alibi": True}
        if latent:
            spec = replace(LATENT_SPEC, num_heads=one((1, 4, 32, 64, 128), (3, 24, 256)), **changes)
        else:
            kv_heads, group = one((1, 2, 4), (3, 257)), one((1, 3, 4), (65,))
            dim = one((16, 32, 64, 80, 128), (40, 272, 512, 528))
            if draw.random() < (0.02 if tiled else 0.25):
                changes["kv_dtype"] = torch.int8
            spec = AttentionSpec(
                num_heads=kv_heads * group,
                num_kv_heads=kv_heads,
                head_dim=dim,
                head_dim_v=one((dim,), (16,)),
                **changes,
            )
        rows = []
        for _ in range(draw.randint(1, 4)):
            queries = draw.choice((0, 1, 1, 2, 9, 18, 40))
            rows.append((queries, draw.choice((0, queries, queries + draw.randint(0, 150)))))
        rows.sort(key=lambda row: row[0] != 1)  # decodes first
        layouts = (LATENT, LATENT_NZ) if latent else (NZ,) if tiled else (NHD_PAGED, HND_PAGED)
        blocks = (16, 128, 128) if latent else (16, 32, 48, 64, 128, 256, 512)
        return Question(
            spec, one(layouts, LAYOUTS), one(blocks, (1, 8, 40, 64, 640)), [queries for queries, _ in rows],
            [keys for _, keys in rows],
        )  # fmt: skip


def ask(kind: type[AttentionKernel], question: Question, backend: Backend) -> bool:
    """Whether the kernel took the question; if so, its answer was right and no operator refused."""
    query = AttentionQuery(spec=question.spec, layout=question.layout, block_size=question.block)
    if kind.supports(query, backend.device):
        return False
    agree(Scene(backend, kind, question.spec, question.layout, question.block, question.q_lens, question.kv_lens))
    return True


@pytest.fixture
def chip(request: pytest.FixtureRequest) -> Iterator[Backend]:
    before, settings.soc, settings.own_blocks = settings.soc, request.param, True
    yield open_backend("ascend-twin", plugins=load_plugins(entries=(), extra=[("a", dougong_ascend), ("t", plugin)]))
    settings.soc, settings.own_blocks = before, False


@pytest.mark.parametrize(
    ("chip", "version", "count"),
    [
        ("Ascend910B1", 1, 40),
        ("Ascend310P3", 1, 40),
        pytest.param("Ascend910B1", 1, 400, marks=pytest.mark.prove),
        pytest.param("Ascend910B1", 2, 400, marks=pytest.mark.prove),
        pytest.param("Ascend310P3", 1, 400, marks=pytest.mark.prove),
    ],
    indirect=["chip"],
)
def test_never_asked(chip: Backend, version: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUGONG_ASCEND_FIA", str(version))
    kinds = KINDS[settings.soc]
    taken = dict.fromkeys(kinds, 0)
    for seed in range(count):
        question = Question.random(seed, tiled="310P" in settings.soc)
        for kind in kinds:
            try:
                taken[kind] += ask(kind, question, chip)
            except Exception as error:
                raise AssertionError(f"{kind.__name__}, seed {seed}: {question}") from error
    assert all(taken.values()), taken
