"""B. Unwritten and padded data: NaN behind the end, scratch slots, empty rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.regression.entry import Entry

__all__ = ["collect"]

_SMALL: dict[str, Any] = {"H": 4, "K": 1}


def collect() -> Iterator[Case]:
    a = Entry(19, "vllm-936-nan-behind-the-context", "vllm-project/vllm", 936)
    for length in (1, "b-1", "b+1", "2b+5"):
        yield a.call(f"kv{length}", rows=[[1, length]], tail="nan", **_SMALL)
    a = Entry(20, "vllm-47305-zero-times-nan", "vllm-project/vllm", 47305)
    for causal in (True, False):
        for q in (1, 5):
            yield a.call(
                f"{'causal' if causal else 'encoder'}-q{q}",
                rows=[[q, "b+6"], [q, 7]],
                causal=causal,
                tail="nan",
                **_SMALL,
            )
    a = Entry(21, "aiter-4245-bad-page-folds-to-slot-zero", "ROCm/aiter", 4245)
    for tail in ("huge", "negative", "zero"):
        yield a.call(tail, rows=[[1, "b+2"], [1, 3], [2, "b"]], table_tail=tail, width=5, tail="nan", **_SMALL)
    a = Entry(22, "aiter-5401-v-padding", "ROCm/aiter", 5401)
    for D in (72, 80, 96):
        yield a.call(f"d{D}", rows=[[1, "b+1"], [3, "b-1"]], D=D, tail="nan", **_SMALL)
    a = Entry(23, "vllm-53856-stale-v-changes-bits", "vllm-project/vllm", 53856)
    for batch, rows in (("decode", [[1, "b+3"], [1, 5]]), ("extend", [[4, "b+3"]])):
        yield a.variants(
            batch,
            {"rows": rows, **_SMALL},
            [{"params": {"tail": "loud"}, "name": "loud finite values in unwritten slots"}],
        )
    a = Entry(24, "transformers-46765-nan-in-the-shared-slot", "huggingface/transformers", 46765)
    yield a.call("write", "write", rows=[[1, 9]], slots="scratch", tokens=12, **_SMALL)
    yield a.call("read", rows=[[1, 9], [0, 0], [3, 0], [2, 20]], write=True, tail="nan", **_SMALL)
    a = Entry(25, "vllm-43869-slot-minus-one", "vllm-project/vllm", 43869)
    for pattern in ("scratch", "scattered", "none"):
        yield a.call(pattern, "write", rows=[[1, 9]], slots=pattern, tokens=5, **_SMALL)
    a = Entry(26, "vllm-ascend-10276-masked-load", "vllm-project/vllm-ascend", 10276)
    for short in ([[1, 1], [0, 0], [0, 3]], [[1, 2], [3, 1]], [[2, 1], [5, 3]]):
        name = "-".join(f"{q}of{kv}" for q, kv in short)
        yield a.call(name, rows=short, tail="nan", **_SMALL)
    a = Entry(27, "flashinfer-1533-empty-rows-unwritten", "flashinfer-ai/flashinfer", 1533)
    for lse in (False, True):
        yield a.call(f"decode{'-lse' if lse else ''}", rows=[[1, 0], [1, 5], [1, 0]], lse=lse, **_SMALL)
        yield a.call(f"extend{'-lse' if lse else ''}", rows=[[3, 0], [4, 2], [2, 9]], lse=lse, **_SMALL)
    a = Entry(28, "vllm-ascend-11774-stale-slots-in-a-capture", "vllm-project/vllm-ascend", 11774)
    yield a.call(
        "slots", "graph", level="L4", rows=[[1, 9], [1, 20]], replays=[{"page_seed": 1}, {"page_seed": 2}], write=True,
        needs=("graphs",), **_SMALL,
    )  # fmt: skip
    yield a.call(
        "padding", "graph", level="L4", rows=[[1, 9], [1, 20], [1, 4]], replays=[{"rows": [[1, 10], [1, 21], [1, 0]]}],
        needs=("graphs",), **_SMALL,
    )  # fmt: skip
