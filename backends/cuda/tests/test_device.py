"""The device on a fake torch.cuda: what it tells the core, what it sets, and a device that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dougong.errors import BackendNotFoundError
from dougong.hal.device import is_out_of_memory
from dougong_cuda import dougong_kernels

GIB = 1 << 30


class Cuda:
    """torch.cuda as far as the device asks it: two H100s, the allocator holding 6 GiB of which 4 are used."""

    CUDAGraph = object

    def __init__(self) -> None:
        self.current = -1

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20)

    def set_device(self, index: int) -> None:
        self.current = index

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 70 * GIB, 80 * GIB

    def memory_reserved(self, index: int) -> int:
        return 6 * GIB

    def memory_allocated(self, index: int) -> int:
        return 4 * GIB


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda()
    monkeypatch.setattr(torch, "cuda", fake)
    torch.get_device_module.cache_clear()  # torch remembers what it found under a type
    yield fake
    torch.get_device_module.cache_clear()


def test_what_the_core_is_told(cuda: Cuda) -> None:
    from dougong_cuda.device import CudaDevice

    device = CudaDevice(1)
    assert (device.type, device.dist_backend, device.name, device.num_processors) == (
        "cuda",
        "nccl",
        "NVIDIA H100",
        132,
    )
    assert device.torch_device == torch.device("cuda", 1)
    assert device.pins_memory, "what is staged on the host is copied without waiting from pinned memory alone"
    assert device.graphs is not None and device.graphs.budget(layers=80) >= 64
    assert device.facts()["compute capability"] == "9.0" and device.facts()["L2 cache (MiB)"] == 50
    # What the allocator holds and nobody uses is free to the cache.
    assert device.memory().free == 72 * GIB and device.memory().total == 80 * GIB
    providers = {one.provider for one in dougong_kernels(device) if one.op == "attention"}
    assert {"triton", "flash-attention", "flashinfer", "torch varlen", "triton + flash-attention"} <= providers


def test_setting_up_chooses_the_device_and_sums_in_float32(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from dougong_cuda.device import CudaDevice

    products = SimpleNamespace(allow_bf16_reduced_precision_reduction=True, allow_fp16_reduced_precision_reduction=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    CudaDevice(1).setup()
    assert cuda.current == 1
    assert not products.allow_bf16_reduced_precision_reduction
    assert not products.allow_fp16_reduced_precision_reduction


def test_a_device_that_is_not_there_is_named_with_the_remedy(cuda: Cuda) -> None:
    from dougong_cuda.device import CudaDevice

    words = r"device_index=2 was asked for; torch sees 2 CUDA device\(s\).*CUDA_VISIBLE_DEVICES"
    with pytest.raises(BackendNotFoundError, match=words):
        CudaDevice(2)


def test_torchs_words_for_a_full_device_are_known() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
