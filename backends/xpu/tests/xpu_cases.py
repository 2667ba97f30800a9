"""A random paged step on any device, run by a kernel and by the core's reference."""

from __future__ import annotations

from typing import Any

import torch

from dougong.hal import AttentionSpec, BatchView, Device, KVGroup, KVLayout, LayerArgs, Limits, allocate_cache
from dougong.hal.reference.attention import ReferenceAttention
from dougong_xpu.flash import SglAttention, VllmAttention
from dougong_xpu.ipex import IpexAttention
from dougong_xpu.limits import IPEX_HND, SGL_NHD, VLLM_NHD

KERNELS: dict[str, tuple[Any, KVLayout, int]] = {
    "vllm": (VllmAttention, VLLM_NHD, 64),
    "sgl": (SglAttention, SGL_NHD, 128),
    "ipex": (IpexAttention, IPEX_HND, 16),
}
DIM = 64


def spec(**more: Any) -> AttentionSpec:
    return AttentionSpec(**{**dict(num_heads=4, num_kv_heads=2, head_dim=DIM, dtype=torch.bfloat16), **more})


def build(kernel: Any, spec: AttentionSpec, layout: KVLayout, block: int, device: Device) -> Any:
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=block, kernel_block=block)
    return kernel(spec, group, Limits(max_rows=8, max_tokens=256, max_kv_len=256, max_blocks=16), device)


def run(
    library: str, spec: AttentionSpec, q_lens: list[int], kv_lens: list[int], device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the library's answer, the reference's), both on the host. K and V are written through the kernel."""
    torch.manual_seed(0)
    kernel, layout, block = KERNELS[library]
    where = device.torch_device
    subject, reference = (build(one, spec, layout, block, device) for one in (kernel, ReferenceAttention))
    width = 256 // block
    cache = allocate_cache(spec, layout, width * len(q_lens) + 1, block, where)
    for plane in cache.planes.values():
        plane.view(torch.uint8).fill_(0x7F)
    table = (torch.randperm(width * len(q_lens)) + 1).reshape(len(q_lens), -1).int()
    whole = BatchView.build(kv_lens, kv_lens, table, block, where)
    kv = torch.randn(2, whole.num_tokens, spec.num_kv_heads, DIM).to(spec.dtype).to(where)
    layer = LayerArgs(0.5, 0.25)
    subject.write(layer, kv[0], kv[1], cache, whole.groups[0].slots)
    batch = BatchView.build(q_lens, kv_lens, table, block, where, slots=torch.arange(sum(q_lens)).to(where))
    packed = torch.randn(batch.num_tokens, spec.num_heads + 2, DIM).to(spec.dtype).to(where)
    answers = []
    for one in (subject, reference):
        plan = one.new_plan()
        one.plan(batch, plan)
        out = torch.full((batch.num_tokens, spec.num_heads, DIM), torch.nan, dtype=spec.dtype).to(where)
        one.run(plan, layer, packed[:, : spec.num_heads], cache, out=out)
        answers.append(out.cpu())
    return answers[0], answers[1]
