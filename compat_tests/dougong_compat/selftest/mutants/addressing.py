"""Bugs of addresses, pages, tables and writes."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_PAGE = 'return plane[block] if kv.layout.name == "nhd" else plane[block].transpose(0, 1)'
_BLOCK = "block = int(plan.table[row, tile])"
_BLOCKS = "blocks = table[positions // n].long()"
_RE = "L1/regression/"

#: A page whose offset does not fit in 31 bits is read from the pool's start.
_WRAP = (
    'return (plane[block] if block * plane.stride(0) < 2**31 else plane[0]) if kv.layout.name == "nhd" '
    "else plane[block].transpose(0, 1)"
)

#: A latent page's place, computed as {0}; K is read there, and V is its first elements.
_GATHER = "            k, v = kv.k[blocks, places], kv.v[blocks, places]\n"
_LATENT = (
    _GATHER + "            if self.spec.latent:\n"
    "                span = (kv.num_blocks - 1) * kv.k.stride(0) + kv.k[0].numel()\n"
    "                at = {0} + places * kv.k.stride(1)\n"
    "                k = kv.k.as_strided((span,), (1,), 0)[at[:, None] + torch.arange(kv.k.shape[-1])][:, None]\n"
    "                v = k[..., : self.spec.head_dim_v]\n"
)

MUTANTS = [
    Mutant("offset-int32-page", "honest-tiled", f"{_RE}01-vllm-1486-slot-offset-overflow/decode", _PAGE, _WRAP, 1),
    Mutant(
        "offset-int32-write", "honest-tiled", f"{_RE}01-vllm-1486-slot-offset-overflow/write",
        "        block, place = slots // n, slots % n\n",
        "        block, place = slots // n, slots % n\n        block = torch.where(block * cache.k.stride(0) < 2**31, block, 0)\n", 1,
    ),
    Mutant(
        "latent-page-int32", "honest-eager", f"{_RE}02-vllm-47671-mla-page-stride/decode", _GATHER,
        _LATENT.format("(blocks.int() * kv.k.stride(0)).long()"), 2,
    ),
    Mutant(
        "gather-int32", "honest-eager", f"{_RE}03-vllm-50427-gather-below-the-cache/decode", _BLOCKS,
        "blocks = table[positions // n].long()\n        blocks = torch.where(blocks * kv.k.stride(0) < 2**31, blocks, 0)", 3,
    ),
    Mutant(
        "past-int32-scores-zero", "honest-tiled", f"{_RE}04-aiter-4774-blocks-past-int32-score-zero/long",
        "k = self.page(kv, kv.k, block)[:width]",
        "k = self.page(kv, kv.k, block)[:width]\n            k = k if block * kv.k.stride(0) < 2**31 else torch.zeros_like(k)", 4,
    ),
    Mutant(
        "span-from-numel", "honest-split", f"{_RE}05-aiter-4673-span-not-numel/giant", _BLOCKS,
        "blocks = table[positions // n].long()\n        blocks = blocks % max(1, kv.k.numel() * kv.k.shape[0] // max(1, kv.k.stride(0) * kv.k.shape[0]))", 5,
    ),
    Mutant(
        "block-id-16-bits", "honest-tiled", f"{_RE}06-aiter-3211-block-id-16-bits/block1", _BLOCK,
        "block = int(plan.table[row, tile]) & 0xFFFF", 6,
    ),
    Mutant(
        "latent-page-wraps", "honest-eager", f"{_RE}07-flashinfer-3136-page-stride-wraps/decode", _GATHER,
        _LATENT.format("blocks * kv.k.stride(0) % 2**32"), 7,
    ),
    Mutant(
        "packed-layers-stride", "honest-tiled", f"{_RE}08-vllm-xpu-kernels-445-packed-layers/wide-decode", _PAGE, _WRAP, 8,
    ),
    Mutant(
        "contiguous-block-stride", "honest-tiled", f"{_RE}10-aiter-3498-interleaved-block-stride/n16", _PAGE,
        "plane = plane.as_strided(plane.shape, (plane[0].numel(), *plane.stride()[1:]), plane.storage_offset())\n"
        "        return plane[block] if kv.layout.name == \"nhd\" else plane[block].transpose(0, 1)", 10,
    ),
    Mutant(
        "q-strides-ignored", "honest-eager", f"{_RE}11-flashinfer-1865-packed-q-strides/prefill-d64",
        "        scale = self.spec.scale\n",
        "        scale = self.spec.scale\n        q = q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1), q.storage_offset())\n", 11,
    ),
    Mutant(
        "kernel-block-for-manager-block", "honest-tiled", f"{_RE}12-vllm-47056-kernel-block-is-not-manager-block/x2",
        "        n = cache.block_size\n", "        n = self.group.manager_block\n", 12,
    ),
    Mutant(
        "small-page-large-head", "honest-tiled", f"{_RE}13-flashinfer-3022-small-page-large-head/n16-d256",
        "v = self.page(kv, kv.v, block)[:width]",
        "v = self.page(kv, kv.v, int(plan.table[row, first]) if n < 64 and spec.head_dim == 256 else block)[:width]", 13,
    ),
    Mutant(
        "lengths-from-the-first-row", "honest-eager", f"{_RE}18-dlinfer-6236044-decode-batch/batch3",
        "        into.lens = view.kv_len.tolist()\n", "        into.lens = [int(view.kv_len.max())] * batch.num_rows if batch.num_rows else []\n", 14,
    ),
    Mutant(
        "identity-pages", "honest-tiled", "L2/regression/15-vllm-gaudi-1546-identity-pages/renamed", _BLOCK,
        "block = int(plan.table[row, 0]) + tile", 15,
    ),
    Mutant(
        "reads-past-the-table", "honest-tiled", f"{_RE}16-aiter-3032-table-out-of-bounds/decode-w0", _BLOCK,
        "block = int(plan.table[row, tile])\n"
        "            __import__('ctypes').c_int.from_address(plan.table.data_ptr() + 4 * plan.table.numel()).value", 16,
    ),
    Mutant(
        "v-has-the-dims-of-k", "honest-eager", f"{_RE}17-fa-e3b2400a-paged-v-dim/192-128",
        "k, v = kv.k[blocks, places], kv.v[blocks, places]",
        "k = kv.k[blocks, places]\n            v = kv.v[blocks, places].roll(kv.k.shape[-1] - kv.v.shape[-1], -1)", 17,
    ),
    Mutant(
        "decode-table-of-row-zero", "honest-tiled", f"{_RE}18-dlinfer-6236044-decode-batch/batch5", _BLOCK,
        "block = int(plan.table[row if q_len > 1 else 0, min(tile, -(-plan.lens[0] // n) - 1) if q_len == 1 else tile])", 18,
    ),
    Mutant(
        "negative-slot-wraps", "honest-tiled", f"{_RE}25-vllm-43869-slot-minus-one/scratch",
        "        block, place = slots // n, slots % n\n",
        "        slots = torch.where(slots < n, slots - n, slots)\n        block, place = slots // n, slots % n\n", 25,
    ),
    Mutant(
        "bad-entry-folds-to-zero", "honest-split", f"{_RE}21-aiter-4245-bad-page-folds-to-slot-zero/huge",
        "            k, v = self.read(kv, layer, plan.table[row], begin, end)\n            distance",
        "            wide = -(-end // kv.block_size) * kv.block_size\n"
        "            entries = torch.where((plan.table[row] < 0) | (plan.table[row] >= kv.k.shape[0]), 0, plan.table[row])\n"
        "            k, v = self.read(kv, layer, entries, begin, wide)\n"
        "            k, v = k[: end - begin], v[: end - begin] + 0 * v[end - begin :].sum(0)\n            distance", 21,
    ),
    Mutant(
        "nan-behind-the-end", "honest-tiled", f"{_RE}19-vllm-936-nan-behind-the-context/kvb+1",
        "            v = self.page(kv, kv.v, block)[:width]\n",
        "            v = self.page(kv, kv.v, block)\n            v = v[:width] + 0 * v[width:].float().sum(0).to(v.dtype)\n", 19,
    ),
    Mutant(
        "zero-times-nan", "honest-eager", f"{_RE}20-vllm-47305-zero-times-nan/encoder-q5",
        "            k, v = self.read(kv, layer, plan.table[row], first, kv_len)\n",
        "            full = -(-kv_len // kv.block_size) * kv.block_size\n"
        "            k, v = self.read(kv, layer, plan.table[row], first, full)\n"
        "            k, v = k[: kv_len - first], v[: kv_len - first] + 0 * v[kv_len - first :].sum(0)\n", 20,
    ),
    Mutant(  # head dims are padded to a power of two: those that are not take another path, which forgets the mask
        "padded-v-unmasked", "honest-tiled", f"{_RE}22-aiter-5401-v-padding/d80",
        "            v = self.page(kv, kv.v, block)[:width]\n",
        "            v = self.page(kv, kv.v, block)\n"
        "            hidden = v[width:] if spec.head_dim & (spec.head_dim - 1) else v[:0]\n"
        "            v = v[:width] + 0 * hidden.float().sum(0).to(v.dtype)\n", 22,
    ),
    Mutant(  # lanes behind the mask keep what lies in memory, in place of the 0 that the load asks for
        "masked-load-not-honoured", "honest-tiled", f"{_RE}26-vllm-ascend-10276-masked-load/2of1-5of3",
        "            k = self.page(kv, kv.k, block)[:width]\n",
        "            k = self.page(kv, kv.k, block)\n            k = k[:width] + 0 * k[width:].float().sum(0).to(k.dtype)\n", 26,
    ),
    Mutant(
        "stale-v-leaks", "honest-tiled", "L2/regression/23-vllm-53856-stale-v-changes-bits/decode",
        "            v = self.page(kv, kv.v, block)[:width]\n",
        "            v = self.page(kv, kv.v, block)\n            rest = torch.nan_to_num(v[width:].float(), nan=0.0).sum(0)\n"
        "            v = (v[:width].float() + 1e-9 * rest).to(v.dtype)\n", 23,
    ),
    Mutant(
        "padding-poisons-the-slot", "honest-eager", f"{_RE}24-transformers-46765-nan-in-the-shared-slot/write",
        "            stored = self.stored(x, scale)\n",
        "            stored = self.stored(x, scale)\n            stored = stored + 0 * stored.float().sum(0).to(stored.dtype)\n", 24,
    ),
    Mutant(
        "scratch-not-skipped", "honest-split", "L1/write/slots/scattered-h8k2-d64-spare4",
        "            stored = self.stored(x, scale)\n", "            stored = self.stored(x, scale)\n            plane[0].zero_()\n",
    ),
    Mutant(
        "write-drops-the-last-token", "honest-eager", "L1/write/slots/run-h8k2-d64-spare4",
        "        block, place = slots // n, slots % n\n",
        "        k, v, slots = k[:-1], v[:-1], slots[:-1]\n        block, place = slots // n, slots % n\n",
    ),
    Mutant(
        "write-swaps-planes", "honest-split", "L1/write/slots/reversed-h8k2-d64-spare4",
        "((cache.k, k, layer.k_scale), (cache.v, v, layer.v_scale))", "((cache.v, k, layer.k_scale), (cache.k, v, layer.v_scale))",
    ),
    Mutant(
        "write-whole-block", "honest-tiled", "L1/write/slots/last-h8k2-d64-spare4",
        "                plane[block, place] = stored\n",
        "                plane[block, place] = stored\n                plane[block[-1:], (place[-1:] + 1) % n] = stored[-1:]\n",
    ),
    Mutant(
        "write-behind-the-block", "honest-tiled", "L1/write/stride/last-h4k2-nhd-n16-d64-gap",
        "                plane[block, place] = stored\n",
        "                plane[block, place] = stored\n"
        "                if plane.stride(0) > plane[0].numel():\n"
        "                    end = plane.storage_offset() + int(block[-1]) * plane.stride(0) + plane[0].numel()\n"
        "                    plane.as_strided((1,), (1,), end).zero_()\n",
    ),
    Mutant(
        "copy-one-layer", "honest-eager", "L2/regression/66-vllm-17362-copy-blocks-layout/copy-nhd",
        "    for cache in caches:\n        for plane", "    for cache in caches[:1]:\n        for plane", 66,
    ),
    Mutant(
        "copy-k-only", "honest-tiled", "L2/copy/blocks/one-x1-h4k2-d64-spare6",
        "        for plane in cache.planes.values():\n", "        for plane in list(cache.planes.values())[:1]:\n", 66,
    ),
    Mutant(
        "copy-forgets-fan-out", "honest-split", "L2/copy/blocks/fan-out-x1-h4k2-d64-spare6",
        "            plane[target] = held\n", "            plane[target[:1]] = held[:1]\n",
    ),
]  # fmt: skip
