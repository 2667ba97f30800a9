"""Weights to and from the panels of ``native/linear.h``. Plain torch on bytes; runs once, at load.

A panel holds 64 outputs; inputs are padded to a multiple of 32. Four-bit values stay four-bit values: packing moves
bytes (or nibbles, for GGUF's order), and scales and minima stay as they are, in float16.
"""

from __future__ import annotations

from ctypes import addressof
from dataclasses import dataclass, field

import torch

from dougong_cpu._abi import FORMATS, Linear

__all__ = ["GROUP", "PANEL", "PackedWeight", "from_gguf_q4_0", "from_gguf_q4_1", "from_gguf_q8_0",
           "pack_dense", "pack_int4", "pack_int8", "quantize_int4", "unpack"]  # fmt: skip

PANEL = 64
GROUP = 32
_DENSE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(eq=False)
class PackedWeight:
    """A weight [N, K] in panels: ``data`` uint8 [panels, bytes per panel].

    ``call`` is the C struct with the weight's address in it, ready for ``dg_product``.
    """

    data: torch.Tensor
    format: str
    shape: tuple[int, int]
    call: Linear = field(init=False, repr=False)
    address: int = field(init=False, repr=False)
    _biased: tuple[torch.Tensor, torch.Tensor, Linear] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.data.data_ptr() % 64:  # whole cache lines: a misaligned vector load costs two
            aligned = torch.empty(self.data.numel() + 64, dtype=torch.uint8)
            start = -aligned.data_ptr() % 64
            self.data = aligned[start : start + self.data.numel()].view_as(self.data).copy_(self.data)
        self.call = Linear(
            w=self.data.data_ptr(), n=self.shape[0], k=self.shape[1], y_st=self.shape[0], format=FORMATS[self.format]
        )

        self.address = addressof(self.call)

    def with_bias(self, bias: torch.Tensor) -> Linear:
        """The call with a bias [N] added, converted to float32 and padded once."""
        if self._biased is None or self._biased[0] is not bias:
            wide = torch.zeros(self.data.shape[0] * PANEL)
            wide[: self.shape[0]] = bias.detach()
            call = Linear.from_buffer_copy(self.call)
            call.bias = wide.data_ptr()
            self._biased = (bias, wide, call)
        return self._biased[2]

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _panels(x: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, C] -> [panels, 64, columns], zeros added."""
    rows = -(-x.shape[0] // PANEL) * PANEL
    if (rows, columns) != tuple(x.shape):
        padded = x.new_zeros(rows, columns)
        padded[: x.shape[0], : x.shape[1]] = x
        x = padded
    return x.reshape(-1, PANEL, columns)


def _padded(k: int) -> int:
    return -(-k // GROUP) * GROUP


def pack_dense(weight: torch.Tensor) -> PackedWeight:
    """A float32, bfloat16 or float16 weight [N, K], kept in its dtype."""
    n, k = weight.shape
    panels = _panels(weight.detach().to("cpu"), _padded(k))
    if weight.dtype == torch.bfloat16:
        data = panels.reshape(panels.shape[0], PANEL, -1, 2).permute(0, 2, 1, 3)
    else:
        data = panels.transpose(1, 2)
    return PackedWeight(_bytes(data).reshape(panels.shape[0], -1), _DENSE[weight.dtype], (n, k))


def pack_int8(q: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
    """q int8 [N, K] with scale [N, 1] (float32, per output) or [N, K/32] (kept in float16, per group)."""
    n, k = q.shape
    panels = _panels(q.to("cpu"), _padded(k)).transpose(1, 2)  # [P, K, 64]
    count = panels.shape[0]
    if scale.shape[1] == 1:
        scales = _panels(scale.to("cpu", torch.float32), 1).reshape(count, PANEL)
        data = torch.cat((_bytes(panels).reshape(count, -1), _bytes(scales)), dim=1)
        return PackedWeight(data, "i8_channel", (n, k))
    values = _bytes(panels).reshape(count, -1, GROUP * PANEL)
    data = torch.cat((_group_halves(scale, values.shape[1]), values), dim=2)
    return PackedWeight(data.reshape(count, -1), "i8_group", (n, k))


def pack_int4(q: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> PackedWeight:
    """q uint8 [N, K/2], element 2j in the low nibble, groups of 32: ``q * scale + minimum``, or ``(q - 8) * scale``.

    scale, minimum [N, K/32] are kept in float16.
    """
    n, k = q.shape[0], q.shape[1] * 2
    panels = _panels(q.to("cpu"), _padded(k) // 2)
    count = panels.shape[0]
    words = panels.reshape(count, PANEL, -1, 4, 4).permute(0, 2, 3, 1, 4)  # [P, G, 4, 64, 4 bytes]
    values = words.reshape(count, -1, GROUP * PANEL // 2)
    parts = [_group_halves(scale, values.shape[1])]
    if minimum is not None:
        parts.append(_group_halves(minimum, values.shape[1]))
    data = torch.cat((*parts, values), dim=2)
    return PackedWeight(data.reshape(count, -1), "i4_sym" if minimum is None else "i4_min", (n, k))


def quantize_int4(weight: torch.Tensor, group_size: int = GROUP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight [N, K] to (q [N, K/2] uint8, scale, minimum [N, K/32]) with float16 scales.

    The values are rounded against the scale and minimum as float16 holds them, so that nothing is lost twice.
    """
    n = weight.shape[0]
    groups = weight.detach().to("cpu", torch.float32).reshape(n, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    minimum = low.to(torch.float16)
    scale = ((high - minimum.float()) / 15).to(torch.float16)
    step = scale.float().clamp_min(1e-12)
    q = ((groups - minimum.float()[..., None]) / step[..., None]).round_().clamp_(0, 15).to(torch.uint8).reshape(n, -1)
    repeat = group_size // GROUP
    if repeat > 1:
        scale, minimum = scale.repeat_interleave(repeat, 1), minimum.repeat_interleave(repeat, 1)
    return q[:, 0::2] | (q[:, 1::2] << 4), scale, minimum


def _group_halves(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, G] -> bytes of float16 [P, G, 64]."""
    return _bytes(_panels(x.to("cpu", torch.float16), groups).transpose(1, 2))


def _blocks(raw: torch.Tensor, shape: tuple[int, int], size: int, name: str) -> torch.Tensor:
    rows, columns = shape
    data = raw.reshape(-1).view(torch.uint8)
    if columns % GROUP or data.numel() != rows * columns // GROUP * size:
        raise ValueError(
            f"{name} of shape {shape}: expected {rows * columns // GROUP * size} bytes, got {data.numel()}"
        )
    return data.reshape(rows, columns // GROUP, size)


def _repair(nibbles: torch.Tensor) -> torch.Tensor:
    """GGUF's order (byte j: elements j and j + 16) [N, G, 16] to neighbours in one byte [N, G * 16]."""
    values = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return (values[..., 0::2] | (values[..., 1::2] << 4)).flatten(1)


def from_gguf_q4_1(raw: torch.Tensor, shape: tuple[int, int]) -> PackedWeight:
    """GGUF Q4_1 blocks of 20 bytes (scale, minimum, 16 bytes of nibbles) of a weight [N, K]; nothing is requantised."""
    blocks = _blocks(raw, shape, 20, "Q4_1")
    halves = blocks[..., :4].contiguous().view(torch.float16)
    return pack_int4(_repair(blocks[..., 4:]), halves[..., 0], halves[..., 1])


def from_gguf_q4_0(raw: torch.Tensor, shape: tuple[int, int]) -> PackedWeight:
    """GGUF Q4_0 blocks of 18 bytes (scale, 16 bytes of nibbles, value minus 8) of a weight [N, K]."""
    blocks = _blocks(raw, shape, 18, "Q4_0")
    return pack_int4(_repair(blocks[..., 2:]), blocks[..., :2].contiguous().view(torch.float16)[..., 0], None)


def from_gguf_q8_0(raw: torch.Tensor, shape: tuple[int, int]) -> PackedWeight:
    """GGUF Q8_0 blocks of 34 bytes (scale, 32 int8) of a weight [N, K]."""
    blocks = _blocks(raw, shape, 34, "Q8_0")
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    return pack_int8(blocks[..., 2:].contiguous().view(torch.int8).flatten(1), scale)


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The weight [N, K] in float32, exactly as the kernels see it."""
    n, k = packed.shape
    count, width = packed.data.shape[0], _padded(k)
    data = packed.data
    if packed.format in ("f32", "f16"):
        wide = data.view(torch.float32 if packed.format == "f32" else torch.float16).reshape(count, width, PANEL)
        panels = wide.float().transpose(1, 2)
    elif packed.format == "bf16":
        pairs = data.view(torch.bfloat16).reshape(count, width // 2, PANEL, 2)
        panels = pairs.float().permute(0, 2, 1, 3).reshape(count, PANEL, width)
    elif packed.format == "i8_channel":
        values = data[:, : width * PANEL].contiguous().view(torch.int8).reshape(count, width, PANEL)
        scale = data[:, width * PANEL :].contiguous().view(torch.float32)
        panels = (values.float() * scale[:, None, :]).transpose(1, 2)
    else:
        panels = _unpack_groups(packed, width)
    return panels.reshape(-1, width)[:n, :k].contiguous()


def _unpack_groups(packed: PackedWeight, width: int) -> torch.Tensor:
    count = packed.data.shape[0]
    data = packed.data.reshape(count, width // GROUP, -1)

    def halves(index: int) -> torch.Tensor:
        part = data[..., index * PANEL * 2 : (index + 1) * PANEL * 2].contiguous()
        return part.view(torch.float16).float()[:, :, None, :]

    if packed.format == "i8_group":
        values = data[..., PANEL * 2 :].contiguous().view(torch.int8).reshape(count, -1, GROUP, PANEL).float()
        wide = values * halves(0)
    else:
        minimum = packed.format == "i4_min"
        words = data[..., PANEL * (4 if minimum else 2) :].reshape(count, -1, 4, PANEL, 4).permute(0, 1, 2, 4, 3)
        values = torch.stack((words & 15, words >> 4), dim=4).reshape(count, -1, GROUP, PANEL).float()
        wide = values * halves(0) + halves(1) if minimum else (values - 8) * halves(0)
    return wide.reshape(count, width, PANEL).transpose(1, 2)
