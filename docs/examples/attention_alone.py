"""The paged attention op called directly with PyTorch tensors: your cache, your block table, dougong's kernel."""

import torch

from dougong import hal
from dougong.hal import NHD, AttentionSpec, BatchView, LayerArgs, LayerCache

H, K, D, BLOCK = 8, 2, 64, 16
spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=D, dtype=torch.float32)
device = torch.device("cpu")  # or "cuda", …
limits = hal.Limits(max_rows=8, max_tokens=64, max_kv_len=64, max_blocks=4)
kernel, _ = hal.attention_kernel(spec, block_size=BLOCK, limits=limits, device=device)

cache = LayerCache({plane: torch.zeros(9, BLOCK, K, D, device=device) for plane in "kv"}, NHD, BLOCK, spec)
table = torch.tensor([[3, 1], [7, 2]])  # two sequences, two blocks each
q, k, v = (torch.randn(21, heads, D, device=device) for heads in (H, K, K))
batch = BatchView.build([1, 20], [1, 20], table, BLOCK, device)  # queries and visible tokens of each; decodes first
plan, out = kernel.new_plan(), torch.empty_like(q)
kernel.write(LayerArgs(), k, v, cache, batch.groups[0].slots)
kernel.plan(batch, plan)  # once per step
kernel.run(plan, LayerArgs(), q, cache, out=out)  # once per layer

q_HTD, k_KTD, v_KTD = (x[1:].transpose(0, 1)[None] for x in (q, k, v))
want = torch.nn.functional.scaled_dot_product_attention(q_HTD, k_KTD, v_KTD, is_causal=True, enable_gqa=True)
torch.testing.assert_close(out[1:], want[0].transpose(0, 1))
