"""Two ranks over gloo, each on its own simulated device."""

from __future__ import annotations

import socket
import subprocess
import sys

RANK = """
import sys
import torch
import torch.distributed as dist
from dougong_sim.device import SimDevice

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
device = SimDevice(rank)
device.setup()
ranks = device.collectives()
x = torch.full((4, 2), rank + 1.0, device="sim")
assert x.device.index == rank
assert ranks.all_reduce(x) is x and x.unique().tolist() == [3.0]
gathered = ranks.all_gather(torch.full((2, 1), float(rank), device="sim"))
assert gathered.device == x.device and gathered.tolist() == [[0.0, 1.0]] * 2
part = ranks.reduce_scatter(torch.arange(4.0, device="sim"))
assert part.tolist() == [[0.0, 2.0], [4.0, 6.0]][rank]
sent = ranks.broadcast(torch.full((2,), float(rank), device="sim"), source=1)
assert sent.tolist() == [1.0, 1.0] and sent.device == x.device
dist.destroy_process_group()
print("done")
"""


def test_two_ranks() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in ranks] == ["done", "done"]
