"""The paged attention op called directly with PyTorch tensors: your cache, your block table, dougong's kernel."""

import torch

from dougong import hal
from dougong.hal import NHD, AttentionSpec, BatchView, KVGroup, LayerArgs, LayerCache

H, K, D, BLOCK = 8, 2, 64, 16
spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=D, dtype=torch.float32)
backend = hal.open_backend("cpu")  # or "cuda"; None takes the best of this machine
kernel_class = backend.choose_attention(hal.AttentionQuery(spec=spec, layout=NHD, block_size=BLOCK)).target
group = KVGroup(index=0, layers=(0,), spec=spec, layout=NHD, manager_block=BLOCK, kernel_block=BLOCK)
kernel = kernel_class(spec, group, hal.Limits(max_rows=8, max_tokens=64, max_kv_len=64, max_blocks=4), backend.device)

device = backend.device.torch_device
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
