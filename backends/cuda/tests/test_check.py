"""`python -m dougong_cuda.check` can come out wrong, and counts a refusal as what it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cuda_twins
import pytest
import torch
from cuda_cases import Here

from dougong.errors import BackendNotFoundError
from dougong.hal.backend import Backend
from dougong.hal.selection import Candidate
from dougong.plugins import load_plugins
from dougong_cuda import check
from dougong_cuda.flash import FlashAttention
from dougong_cuda.providers import kernel_specs


@pytest.fixture
def rows(twins: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the checks of FlashAttention, which is there as a twin, and of FlashInfer, which is not, in small."""
    cuda_twins.install("vllm")
    monkeypatch.setattr(check, "PROVIDERS", ("flash-attention", "flashinfer"))
    monkeypatch.setattr(check, "BATCHES", {"mixed": ([1, 1, 9, 0], [40, 5, 30, 12]), "blind": ([1, 2], [0, 1])})
    device = Here()
    backend = Backend("cuda", "cuda", device, load_plugins("", entries=()))
    backend.candidates["attention"] = [
        Candidate("cuda", one)
        for one in kernel_specs(device)
        if one.op == "attention"  # type: ignore[arg-type]
    ]

    def run() -> list[dict[str, Any]]:
        torch.manual_seed(0)
        return list(check.answers(backend, {"lse": {"lse": True}}))

    return run


def test_agreement_and_refusal_are_told_apart(rows: Any) -> None:
    found = rows()
    assert {row["batch"] for row in found} == {"mixed", "blind", "ragged"}
    counts = Counter((row["provider"], check.outcome(row)) for row in found)
    assert counts == {("flash-attention", "right"): 6, ("flashinfer", "refused"): 6}
    assert all("not installed" in str(row["refused"]) for row in found if row["provider"] == "flashinfer")
    text = check.summary(counts)
    assert text == "12 checks: 6 right, 6 refused (flash-attention: 6 right; flashinfer: 6 refused)"


@pytest.mark.parametrize("fault", ["scaled", "lse", "raises"])
def test_a_library_that_is_wrong_is_found(rows: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FlashAttention.run

    def run(self: Any, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        plain(self, plan, layer, q, kv, out=out, lse=lse)
        if fault == "scaled":
            out.mul_(1.05)
        else:
            lse.add_(0.01)

    monkeypatch.setattr(FlashAttention, "run", run)
    found = [row for row in rows() if row["provider"] == "flash-attention" and row["batch"] != "blind"]
    assert found and all(check.outcome(row) == "wrong" for row in found)
    if fault == "raises":
        assert found[0]["raised"] == "RuntimeError: no kernel image is available"


def test_not_a_number_and_what_should_be_nothing_are_wrong_beyond_any_bound() -> None:
    want = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert check.differs(want.clone(), want) == 0.0
    assert check.differs(torch.tensor([[1.0, 0.0], [0.0, 1e-9]]), want) > 1e30
    assert check.differs(torch.tensor([[torch.nan, 0.0], [0.0, 0.0]]), want) > 1e30
    sums = torch.tensor([1.0, -torch.inf])
    assert check.lse_differs(sums.clone(), sums) == 0.0
    assert check.lse_differs(torch.tensor([1.0, 0.0]), sums) > 1e30


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise BackendNotFoundError("backend 'cuda': no NVIDIA driver was found")

    monkeypatch.setattr(check, "open_backend", none)
    assert check.main(["--no-speed"]) == 2
    assert "no NVIDIA driver" in capsys.readouterr().err
