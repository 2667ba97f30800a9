"""A random paged batch on the twin, run by a kernel of this backend and by the core's reference on the host."""

from __future__ import annotations

from dataclasses import replace

import torch

from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionSpec,
    Backend,
    BatchView,
    KVGroup,
    KVLayout,
    LayerArgs,
    Limits,
    allocate_cache,
    convert_blocks,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong_ascend.layouts import LATENT

__all__ = ["BATCHES", "LATENT_SPEC", "SPEC", "Scene", "agree"]

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)
LATENT_SPEC = AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True)
#: (query lengths, kv lengths), decodes first.
BATCHES = {
    "decode": ([1, 1, 1], [5, 131, 1]),
    "prefill": ([7, 3], [7, 3]),
    "extend": ([5, 5, 2], [130, 9, 140]),
    "mixed": ([1, 1, 0, 6, 0, 1], [33, 129, 0, 20, 12, 4]),
    "blind": ([1, 4, 3], [0, 2, 0]),
    "nothing": ([0, 0], [3, 0]),
}


class Scene:
    """A batch with its caches on the host and on the device, everything unwritten poisoned."""

    def __init__(
        self, backend: Backend, kind: type[AttentionKernel], spec: AttentionSpec, layout: KVLayout, block: int,
        q_lens: list[int], kv_lens: list[int], window_zero: bool = True,
    ) -> None:  # fmt: skip
        rows = len(q_lens)
        width = max(1, -(-max(kv_lens) // block)) + 1
        generator = torch.Generator().manual_seed(len(q_lens) * 1000 + sum(kv_lens))
        self.spec, self.q_lens, self.kv_lens = spec, q_lens, kv_lens
        self.host_group = KVGroup(
            index=0, layers=(0,), spec=spec, layout=self._plain(layout), manager_block=block, kernel_block=block
        )
        self.group = replace(self.host_group, layout=layout)
        limits = Limits(max_rows=rows, max_tokens=sum(q_lens) + 1, max_kv_len=width * block, max_blocks=width)
        blocks = 1 + sum(-(-n // block) for n in kv_lens)
        order = (1 + torch.randperm(blocks - 1, generator=generator)).tolist()
        table = torch.full((rows, width), 2**30, dtype=torch.int32)  # garbage: no address
        host = allocate_cache(spec, self._plain(layout), blocks, block, "cpu")
        for plane in host.planes.values():
            plane.fill_(torch.nan if plane.is_floating_point() else 127)
        louder = 40 if spec.kv_dtype == torch.int8 else 1
        for row, kv_len in enumerate(kv_lens):
            count = -(-kv_len // block)
            table[row, :count] = torch.tensor(order[:count], dtype=torch.int32)
            del order[:count]
            places = torch.arange(kv_len)
            slots = table[row].long()[places // block] * block + places % block
            k = torch.randn(kv_len, spec.num_kv_heads, spec.head_dim, generator=generator).mul(louder).to(spec.dtype)
            v = torch.randn(kv_len, spec.num_kv_heads, spec.head_dim_v, generator=generator).mul(louder).to(spec.dtype)
            host.write(slots, k, k[..., : spec.head_dim_v] if spec.latent else v)
            if spec.window is not None and window_zero:  # the manager frees what lies wholly behind the window
                behind = max(0, kv_len - q_lens[row] - spec.window + 1) // block
                table[row, :behind] = 0
        self.device = backend.device
        self.cache = backend.device.empty_cache(self.group, blocks)
        ids = torch.arange(blocks)
        convert_blocks(host, ids, self.cache, ids.to("npu"))
        self.host, self.table = host, table
        self.q = torch.randn(sum(q_lens), spec.num_heads, spec.head_dim, generator=generator).to(spec.dtype)
        self.layer = LayerArgs(
            k_scale=1.01 / louder, v_scale=torch.tensor([0.97 / louder]) if louder > 1 else 1.0,
            sinks=torch.randn(spec.num_heads, generator=generator) if spec.sinks else None,
        )  # fmt: skip
        self.kernel = kind(spec, self.group, limits, backend.device)
        self.plan = self.kernel.new_plan()
        self.reference = ReferenceAttention(spec, self.host_group, limits, backend.device)

    @staticmethod
    def _plain(layout: KVLayout) -> KVLayout:
        return KVLayout(layout.name, LATENT.planes) if "latent" in layout.planes else NHD

    def batch(self, where: str) -> BatchView:
        slots = torch.zeros(sum(self.q_lens), dtype=torch.int64, device=where)
        return BatchView.build(self.q_lens, self.kv_lens, self.table, self.group.kernel_block, where, slots=slots)

    def answers(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = self._outputs("npu")
        self.kernel.plan(self.batch("npu"), self.plan)
        layer = replace(self.layer, sinks=None if self.layer.sinks is None else self.layer.sinks.to("npu"))
        self.kernel.run(self.plan, layer, self.q.to("npu"), self.cache, out=out, lse=lse)
        return out.cpu(), None if lse is None else lse.cpu()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = self._outputs("cpu")
        plan = self.reference.new_plan()
        self.reference.plan(self.batch("cpu"), plan)
        self.reference.run(plan, self.layer, self.q, self.host, out=out, lse=lse)
        return out, lse

    def _outputs(self, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = len(self.q), self.spec.num_heads
        out = torch.full((*shape, self.spec.head_dim_v), torch.nan, dtype=self.spec.dtype, device=where)
        return out, torch.full(shape, torch.nan, device=where) if self.spec.lse else None


def agree(scene: Scene) -> None:
    (out, lse), (right, right_lse) = scene.answers(), scene.expected()
    torch.testing.assert_close(out, right, rtol=2**-6, atol=2**-7)
    if lse is not None:
        torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)
