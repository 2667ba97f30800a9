"""Every operator that an engine uses gives on the device exactly what it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

Tensors = Any


class Inputs:
    """The same tensors on any device, made anew for each run, so that a case may change them."""

    def __init__(self, device: str) -> None:
        def put(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        seed = torch.Generator().manual_seed(0)
        self.dev = device
        self.x = put(torch.randn(4, 6, generator=seed))
        self.y = put(torch.randn(4, 6, generator=seed))
        self.w = put(torch.randn(5, 6, generator=seed))
        self.h = put(torch.randn(3, 8, generator=seed).bfloat16())
        self.half = put(torch.randn(3, 8, generator=seed).half())
        self.i = put(torch.tensor([3, 1, 0], dtype=torch.int64))
        self.i32 = put(torch.tensor([[2, 0], [1, 3]], dtype=torch.int32))
        self.mask = put(torch.tensor([True, False, True, True]))
        self.bytes = put(torch.arange(8, dtype=torch.uint8))
        self.cube = put(torch.randn(2, 3, 4, generator=seed))
        self.empty = put(torch.empty(0, 6))
        self.cache = put(torch.zeros(5, 4, 2, 3))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, 7, dtype=dtype, device=self.dev)


def out(fn: Callable[..., Any], *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Inputs], Tensors]:
    """A case that writes into a tensor given as out=, and into a strided view."""

    def case(t: Inputs) -> Tensors:
        plain, wide = t.new(*shape, dtype=dtype), t.new(*shape[:-1], shape[-1] * 2, dtype=dtype)
        fn(t, plain)
        fn(t, wide[..., ::2])
        return plain, wide

    return case


def in_place(fn: Callable[[Inputs, torch.Tensor], Any]) -> Callable[[Inputs], Tensors]:
    """A case that changes a view; the base shows what changed and what did not."""

    def case(t: Inputs) -> Tensors:
        base = t.new(8, 12)
        base[::2] = 1.5
        fn(t, base[1:5, 2:8])
        fn(t, base.view(-1)[:48].view(8, 6)[4:])
        return base

    return case


def grown(t: Inputs) -> Tensors:
    result = torch.empty(0, device=t.dev)
    torch.add(t.x, t.y, out=result)
    return result


def views(t: Inputs) -> Tensors:
    c = t.new(4, 6, 2)
    c.transpose(0, 1)[2, :, 1] = 0
    c.unfold(1, 2, 2)[1].mul_(3)
    c.permute(2, 0, 1)[0].narrow(1, 1, 2).fill_(9)
    c.view(torch.int32).view(-1)[:3] = 5
    c.squeeze_(0).unsqueeze(0).flatten().as_strided((2, 2), (5, 3), 4).neg_()
    return c, c.expand(2, 4, 6, 2)[1].diagonal(), c.movedim(0, -1).contiguous(), c.split(1, 0)[3], c.unbind(1)[2]


def rms_norm(t: Inputs) -> Tensors:
    x = t.h.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(t.h.dtype) * t.h[0], F.rms_norm(t.x, (6,))


def rope(t: Inputs) -> Tensors:
    angle = torch.outer(torch.arange(4, device=t.dev).float(), 1 / 10000 ** (torch.arange(0, 3, device=t.dev) / 3))
    a, b = t.x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention(t: Inputs) -> Tensors:
    q = t.cube.new_ones(1, 2, 3, 4) * t.cube[:, :, :4]
    mask = torch.ones(3, 3, dtype=torch.bool, device=t.dev).tril()
    return (
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
        F.scaled_dot_product_attention(q.bfloat16(), q[:, :1].bfloat16(), q[:, :1].bfloat16(), enable_gqa=True),
    )


def sliced(t: Inputs) -> Tensors:
    t.x[1:3, ::2] = t.y[:2, :3]
    t.x[0] = 4
    t.x[t.i, 5] = t.y[:3, 0]
    t.x[t.mask] += 1
    t.x[-1, -1] = t.y[0, 0]
    return t.x


CASES: dict[str, Callable[[Inputs], Tensors]] = {
    "add": lambda t: (t.x + t.y, t.x + 2, 2 - t.x, t.x * torch.tensor(3.0)),
    "div_floor_mod": lambda t: (t.x / t.y, t.i // 2, t.i % 2, torch.div(t.i, 2, rounding_mode="floor")),
    "compare": lambda t: (t.x > t.y, t.i == 1, t.x.isnan(), t.x.isinf(), t.mask & ~t.mask, t.mask.any(), t.mask.all()),
    "where": lambda t: (torch.where(t.x > 0, t.x, t.y), torch.where(t.x > 0, t.x, 0.0)),
    "where_out": out(lambda t, o: torch.where(t.x > 0, t.x, t.y, out=o), 4, 6),
    "factories": lambda t: (
        torch.zeros(3, device=t.dev), torch.ones_like(t.h), torch.arange(2, 9, 3, device=t.dev), t.x.new_tensor([1, 2]),
        torch.full((2,), -torch.inf, device=t.dev), torch.tensor([1, 2], device=t.dev), t.x.new_zeros(2),
        torch.eye(3, device=t.dev), torch.linspace(0, 1, 4, device=t.dev), torch.empty_like(t.x).fill_(1),
    ),
    "empty_strided": lambda t: torch.empty_strided((2, 3), (1, 2), device=t.dev).fill_(2).t().contiguous(),
    "as_strided": lambda t: t.x.as_strided((3, 2), (2, 5), 1),
    "cast": lambda t: (t.x.to(torch.int32), t.x.bfloat16(), t.h.float(), t.bytes.bool(), t.i.float(), t.half.double()),
    "copy_": in_place(lambda t, v: v.copy_(t.x)),
    "copy_cast": in_place(lambda t, v: v.copy_(t.x.to(torch.int64), non_blocking=True)),
    "views": views,
    "sliced": sliced,
    "reshape": lambda t: (t.x.t().reshape(-1), t.cube.flatten(1), t.cube.view(6, 4), t.x.unsqueeze(1).expand(4, 2, 6)),
    "cat_stack": lambda t: (torch.cat((t.x, t.y), -1), torch.stack((t.x, t.y)), torch.cat((t.empty, t.x))),
    "cat_out": out(lambda t, o: torch.cat((t.x[:2], t.y[2:]), out=o), 4, 6),
    "repeat": lambda t: (t.x.repeat(2, 1), t.i.repeat_interleave(2), torch.repeat_interleave(t.i, t.i), t.x.tile(1, 2)),
    "flip_roll_pad": lambda t: (t.x.flip(0), t.x.roll(1, 1), F.pad(t.x, (1, 2)), t.x.tril(), t.x.triu(1)),
    "clamp": lambda t: (t.x.clamp(-1, 1), t.x.clamp_min(0), torch.maximum(t.x, t.y), torch.minimum(t.x, t.y)),
    "in_place": in_place(lambda t, v: v.add_(t.x).mul_(2).sub_(t.y, alpha=3).clamp_(-2, 2)),
    "fill_zero": in_place(lambda t, v: (v.zero_(), v[0].fill_(3), v.masked_fill_(t.x > 0, -1))),
    "masked_fill": lambda t: (t.x.masked_fill(t.mask[:, None], 0), t.x.masked_fill(t.x > 0, -torch.inf)),
    "masked_select": lambda t: (t.x[t.mask], t.x.masked_select(t.x > 0), t.mask.nonzero()),
    "index_select": lambda t: t.x.index_select(0, t.i),
    "index_select_out": out(lambda t, o: torch.index_select(t.x, 0, t.i, out=o), 3, 6),
    "index_copy_": in_place(lambda t, v: v.index_copy_(0, t.i, t.y[:3])),
    "index_add_": in_place(lambda t, v: v.index_add_(0, t.i, t.y[:3])),
    "index_fill_": in_place(lambda t, v: v.index_fill_(1, t.i, 2.0)),
    "index": lambda t: (t.x[t.i], t.x[:, t.i], t.x[t.i32.long(), 1], t.x[t.i, t.i], t.x[torch.tensor([0, 2])]),
    "index_put": in_place(lambda t, v: v.index_put_((t.i,), t.y[:3], accumulate=True)),
    "cache_write": lambda t: t.cache.view(20, 2, 3).index_copy_(0, t.i, t.cube[:1, :2, :3].expand(3, 2, 3)),
    "cache_index_put": lambda t: t.cache.index_put_((t.i, t.i), t.cube[:1, :2, :3].expand(3, 2, 3)),
    "gather": lambda t: (t.x.gather(1, t.i32.long()), torch.take_along_dim(t.x, t.x.argsort(-1), 1)),
    "gather_out": out(lambda t, o: torch.gather(t.x, 1, t.i32.long(), out=o), 2, 2),
    "scatter_": in_place(lambda t, v: v.scatter_(1, t.i32.long(), 5.0)),
    "scatter_add_": in_place(lambda t, v: v.scatter_add_(1, t.i32.long(), t.y[:2, :2])),
    "scatter_reduce": lambda t: t.x.scatter_reduce(1, t.i32.long(), t.y, "amax"),
    "bincount_one_hot": lambda t: (torch.bincount(t.i, minlength=5), F.one_hot(t.i, 5), torch.unique(t.i32)),
    "topk": lambda t: tuple(t.x.topk(3, -1)) + tuple(t.h.float().topk(2, sorted=True)),
    "sort": lambda t: tuple(t.x.sort(dim=-1, descending=True, stable=True)) + (t.x.argsort(-1), t.i.sort().values),
    "cumsum": lambda t: (t.x.cumsum(-1), t.i.cumsum(0, dtype=torch.int32), t.x.cumprod(0)),
    "cumsum_out": out(lambda t, o: torch.cumsum(t.x, 0, out=o), 4, 6),
    "searchsorted": lambda t: torch.searchsorted(t.x.sort(-1).values, t.y),
    "argmax": lambda t: (t.x.argmax(-1), t.x.argmin(0), t.x.max(-1).values, t.x.amax(0), t.x.min(), t.x.aminmax()[1]),
    "argmax_out": out(lambda t, o: torch.argmax(t.x, -1, out=o), 4, dtype=torch.int64),
    "reduce": lambda t: (t.x.sum(-1), t.x.mean(0), t.x.square().sum(), t.x.prod(-1), t.x.std(-1), t.x.norm(dim=-1)),
    "softmax": lambda t: (t.x.softmax(-1), t.x.log_softmax(-1), t.h.softmax(-1, dtype=torch.float32)),
    "logsumexp": lambda t: (t.x.logsumexp(-1), torch.logaddexp(t.x, t.y)),
    "pointwise": lambda t: (t.x.exp(), t.x.abs().log(), t.x.tanh(), t.x.sigmoid(), t.x.pow(2), -t.x, t.x.sin()),
    "bits": lambda t: (t.i << 2, t.i & 1, t.i ^ 3, t.bytes >> 1, t.bytes | 4),
    "activations": lambda t: (F.silu(t.x) * t.y, F.gelu(t.x, approximate="tanh"), F.relu(t.h), F.softplus(t.x)),
    "linear": lambda t: (F.linear(t.x, t.w), F.linear(t.x, t.w, t.w[:, 0]), F.linear(t.h, t.h), t.cube @ t.cube.mT),
    "mm_out": out(lambda t, o: torch.mm(t.x, t.w.t(), out=o), 4, 5),
    "matmul": lambda t: (t.x @ t.w.t(), torch.bmm(t.cube, t.cube.mT), torch.addmm(t.w[:, 0], t.x, t.w.t())),
    "einsum": lambda t: torch.einsum("bqd,bkd->bqk", t.cube, t.cube),
    "embedding": lambda t: (F.embedding(t.i, t.w), F.embedding(t.i32, t.w)),
    "rms_norm": rms_norm,
    "layer_norm": lambda t: F.layer_norm(t.x, (6,), t.w[0], t.w[1]),
    "rope": rope,
    "sdpa": attention,
    "zero_size": lambda t: (
        t.empty @ t.w.t(), t.empty.sum(0), t.empty + 1, t.empty.softmax(-1), torch.cat((t.empty, t.empty)), t.x[4:],
        t.x[:, :0].contiguous(), t.empty.clone(), t.x.index_select(0, t.i[:0]), t.empty.view(0, 2, 3), t.empty.t(),
    ),
    "zero_size_in_place": in_place(lambda t, v: (v[:0].copy_(t.empty), v.index_copy_(0, t.i[:0], t.empty))),
    "out_grows": grown,
    "foreach": lambda t: tuple(torch._foreach_add([t.x, t.y], 1.0)),
    "foreach_": lambda t: (torch._foreach_mul_([t.x, t.y], 2.0), t.x, t.y)[1:],
    "resize_set": lambda t: (t.x.clone().resize_(2, 3), t.x.clone().set_(t.y), torch.zeros_like(t.x).t_()),
    "int8_pack": lambda t: torch._weight_int8pack_mm(t.h.repeat(1, 12), t.new(8, 96, dtype=torch.int8), t.h[0]),
}  # fmt: skip

#: Where the device takes torch's composite path and the CPU a fused one.
CLOSE = {"layer_norm", "sdpa"}


def flat(result: Tensors) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
@pytest.mark.parametrize("name", CASES)
def test_same_as_cpu(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        want, got = flat(CASES[name](Inputs("cpu"))), flat(CASES[name](Inputs("sim")))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("sim", 0)
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        if name in CLOSE:
            torch.testing.assert_close(a.cpu(), b)
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_every_dtype_travels(dtype: torch.dtype) -> None:
    x = torch.arange(12.0).reshape(3, 4).to(dtype)
    for source in (x, x.t(), x[:, ::2]):
        there = source.to("sim")
        assert there.dtype == dtype
        assert torch.equal(there.to("sim:1").cpu().float(), source.float())
        assert torch.equal(torch.empty_like(source).copy_(there, non_blocking=True).float(), source.float())


def test_random_numbers_are_seeded_by_device() -> None:
    def draw(device: str) -> list[torch.Tensor]:
        weights = torch.arange(1, 6, device=device).float().softmax(0)
        return [
            torch.rand(3, device=device), torch.empty(3, device=device).exponential_(), torch.multinomial(weights, 2),
            torch.randint(0, 9, (4,), device=device), torch.randn(2, device=device), torch.randperm(5, device=device),
        ]  # fmt: skip

    torch.manual_seed(5)
    first = draw("sim")
    host = draw("cpu")
    for a, b in zip(first, host, strict=True):  # one algorithm, and neither device disturbed the other's state
        assert torch.equal(a.cpu(), b)
    torch.sim.manual_seed_all(5)
    again = draw("sim")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(draw("sim:1")[0].cpu(), first[0].cpu())


def test_generator_belongs_to_its_device() -> None:
    g = torch.Generator("sim:1").manual_seed(3)
    assert g.device == torch.device("sim", 1)
    state = g.get_state()
    x = torch.empty(4, device="sim:1").exponential_(generator=g)
    g.set_state(state)
    assert torch.equal(torch.empty(4, device="sim:1").exponential_(generator=g), x)


@pytest.mark.parametrize(
    "mix",
    [
        lambda s, c: s + c,
        lambda s, c: c + s,
        lambda s, c: s @ c,
        lambda s, c: torch.cat((s, c)),
        lambda s, c: s.add_(c),
        lambda s, c: torch.add(c, c, out=s),
        lambda s, c: s + c.to("sim:1"),
        lambda s, c: F.embedding(torch.tensor([0]), s),
    ],
)
def test_mixed_devices_are_refused(mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*sim:0.*(cpu|sim:1)|same device.*cpu.*sim:0"):
        mix(torch.ones(2, 2, device="sim"), torch.ones(2, 2))


def test_a_number_on_the_host_may_be_mixed_in() -> None:
    assert (torch.ones(2, device="sim") + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def test_numpy_needs_a_copy() -> None:
    with pytest.raises(TypeError, match="sim"):
        torch.ones(2, device="sim").numpy()


def test_autograd() -> None:
    w = torch.ones(3, 2, device="sim", requires_grad=True)
    (torch.arange(6, device="sim").float().view(2, 3) @ w).square().sum().backward()
    assert w.grad is not None
    assert w.grad.device.type == "sim"
    assert w.grad.tolist() == [[72.0, 72.0], [102.0, 102.0], [132.0, 132.0]]
