"""What the old plugin's specs name."""

import torch

from dougong.hal import NHD, AttentionKernel, Device, MemoryInfo, Plan, Refusal

CALLS = {"write": 0, "plan": 0, "run": 0}


class OldDevice(Device):
    type = "cpu"

    def __init__(self, index=0):
        self.index = index
        self.torch_device = torch.device("cpu")
        self.dtypes = (torch.float32,)

    def setup(self):
        pass

    def memory(self):
        return MemoryInfo(1 << 30, 1 << 30)

    def synchronize(self):
        pass

    def new_stream(self):
        return None

    def new_event(self):
        class Event:
            def record(self, *args):
                pass

            def synchronize(self):
                pass

            def query(self):
                return True

        return Event()


class OldPlan(Plan):
    pass


class OldAttention(AttentionKernel):
    layouts = (NHD,)

    @classmethod
    def supports(cls, query, device):
        reasons = []
        if query.spec.window == 1:
            reasons.append(Refusal("windows of one", nearest="2"))
        if query.max_kv_len is not None and query.max_kv_len > 4096:
            reasons.append(Refusal(f"{query.max_kv_len} keys", nearest="4096"))
        return tuple(reasons)

    def new_plan(self):
        return OldPlan()

    def plan(self, batch, into):
        CALLS["plan"] += 1
        into.batch = batch

    def write(self, layer, k, v, cache, slots):
        CALLS["write"] += 1
        cache.write(slots, k, v)

    def run(self, plan, layer, q, kv, *, out, lse=None):
        CALLS["run"] += 1
        batch, spec = plan.batch, self.spec
        assert layer.host_scales == (1.0, 1.0)
        view = batch.groups[self.group.index]
        for row in range(batch.num_rows):
            start, stop = int(batch.host_cu_q[row]), int(batch.host_cu_q[row + 1])
            length = int(view.kv_len[row])
            positions = torch.arange(length)
            slots = view.block_table[row, positions // kv.block_size].long() * kv.block_size
            keys, values = kv.read(slots + positions % kv.block_size)
            for token in range(start, stop):
                last = length - (stop - token) + 1
                low = max(0, last - spec.window) if spec.window else 0
                k, v = (x[low:last].repeat_interleave(spec.group_size, 1) for x in (keys, values))
                weights = (torch.einsum("hd,nhd->hn", q[token], k) * spec.scale).softmax(-1)
                out[token] = torch.einsum("hn,nhd->hd", weights, v)
        out.masked_fill_(batch.blind(spec, view.kv_len)[:, None, None], 0)


def silu_mul(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


silu_mul.supports = lambda query, device: () if query.op == "silu_mul" else (Refusal("another op"),)
