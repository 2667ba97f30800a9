"""A two-layer model for 16-bit types that computes with codes: every choice it makes is clear, whatever the rounding.

A random model has near ties in a few of a hundred places, and in bfloat16 an honest engine falls on either side of
them. Here a token is a pair of digits below 8, each a row of a Hadamard matrix: products of rows are rows, different
rows are orthogonal. Each head reads one earlier position, by a query whose rotation peaks at one distance (the best
key leads the next by 9 nats or more); the distance hangs on the current token's digits. The MLP multiplies what two
heads found, digit by digit: ``silu(x) y + silu(-x) (-y) = x y``. So layer 1 gives every position a new pair of digits,
layer 2 does the same with those, and the result is the next token. Its logit is 64, that of any other 32 at most. A
block read wrong, a key too few or a position counted wrong changes the token in most of all places at once.
"""

from __future__ import annotations

import random
from typing import Any

import torch

__all__ = ["CODED", "coded_weights"]

_BASE, _WIDTH = 8, 32  # digits below 8, each written in 32 signs
_CODE = 2 * _WIDTH
# The stream's parts, 64 wide each: the token, what the heads of a layer found (twice), its result; and ones.
_TOKEN, _LEFT, _RIGHT, _RESULT, _ONES = 0, (1, 4), (2, 5), (3, 6), 7
_PARTS = 8
#: Distance -> seed of the amplitudes that make its peak stand out, found by search among 400 for 160 positions.
_DISTANCES = {
    0: 327, 1: 327, 2: 327, 3: 327, 4: 327, 5: 67, 6: 167, 7: 167, 9: 167, 11: 201, 16: 217, 17: 217, 24: 312, 32: 312,
    48: 67, 56: 67,
}  # fmt: skip
_PAIRS = 16  # rotary pairs in use: the quick ones
_NATS = 500.0  # a query's score at its peak
_KEY = 8.0
_STEEP = 4.0
_SHIFTS = (5, 3), (6, 1)  # multiplied into each layer's digits, so that zeros do not stay zeros

CODED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _BASE * _BASE,
    "hidden_size": _PARTS * _CODE, "intermediate_size": 2 * _CODE, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def _digits() -> torch.Tensor:
    """[8, 32] of signs: row i times row j is row i ^ j."""
    rows = torch.ones(1, 1)
    while len(rows) < _BASE:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    return rows.repeat(1, _WIDTH // _BASE)


def _codes() -> torch.Tensor:
    """[64, 64]: token t is digit t // 8, then digit t % 8."""
    digits = _digits()
    return torch.cat((digits.repeat_interleave(_BASE, 0), digits.repeat(_BASE, 1)), 1)


def _part(index: int) -> slice:
    return slice(index * _CODE, (index + 1) * _CODE)


def _query(distance: int, head_dim: int, theta: float) -> torch.Tensor:
    """[head_dim]: with the key (8, …, 8; 0, …, 0) its score is ``sum a cos(w (d - distance))`` at distance d."""
    draw = random.Random(_DISTANCES[distance])
    amplitudes = torch.tensor([draw.random() ** 0.5 for _ in range(_PAIRS)], dtype=torch.float64)
    amplitudes *= _NATS * head_dim**0.5 / _KEY / amplitudes.sum()
    angle = distance * theta ** (-torch.arange(_PAIRS).double() / (head_dim // 2))
    query = torch.zeros(head_dim, dtype=torch.float64)
    query[:_PAIRS] = amplitudes * angle.cos()
    query[head_dim // 2 : head_dim // 2 + _PAIRS] = -amplitudes * angle.sin()
    return query


def coded_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by their names in the files, rounded to ``dtype``."""
    c, digits, codes = CODED, _digits(), _codes()
    width, D, H = c["hidden_size"], c["head_dim"], c["num_attention_heads"]
    choose = random.Random(0)
    embed = torch.zeros(c["vocab_size"], width)
    embed[:, _part(_TOKEN)], embed[:, _part(_ONES)] = codes, 1.0
    head = torch.zeros(c["vocab_size"], width)
    head[:, _part(_RESULT[1])] = codes
    out = {"model.embed_tokens.weight": embed, "lm_head.weight": head, "model.norm.weight": torch.ones(width)}
    signs, filled = torch.eye(_CODE), 2  # parts of the stream that hold signs when the layer begins
    for layer, (left, right, result) in enumerate(zip(_LEFT, _RIGHT, _RESULT)):
        source = _part(_TOKEN if layer == 0 else _RESULT[0])
        norm, inner = (_PARTS / filled) ** 0.5, (_PARTS / (filled + 2)) ** 0.5
        q, k, v = torch.zeros(H * D, width), torch.zeros(D, width), torch.zeros(D, width)
        o = torch.zeros(width, H * D)
        for number in range(H):
            # heads 0 and 1 find the first digit, 2 and 3 the second; which distance, one digit of the token here says
            digit, side = number // 2, (left, right)[number % 2]
            selector = slice(source.start + (number % 2) * _WIDTH, source.start + (number % 2 + 1) * _WIDTH)
            distances = choose.sample(sorted(_DISTANCES), _BASE)
            queries = torch.stack([_query(distance, D, c["rope_theta"]) for distance in distances]).float()
            q[number * D : (number + 1) * D, selector] = queries.T @ digits / (_WIDTH * norm)
            for dim in range(digit * _WIDTH, (digit + 1) * _WIDTH):
                o[side * _CODE + dim, number * D + dim] = 1.0
        k[:_PAIRS, _part(_ONES)] = _KEY / (_CODE * norm)
        v[:, source] = signs / norm
        gate, up = torch.zeros(2 * _CODE, width), torch.zeros(2 * _CODE, width)
        gate[:, _part(left)] = torch.cat((signs, -signs)) * (_STEEP / inner)
        up[:, _part(right)] = torch.cat((signs, -signs)) / inner
        first, second = _SHIFTS[layer]
        shift = codes[first * _BASE + second][:, None]
        down = torch.zeros(width, 2 * _CODE)
        # the digits change places, so that each hangs on both after two layers
        down[_part(result)] = torch.cat((signs, signs), 1).roll(_WIDTH, 0) * shift / _STEEP
        filled += 3
        base = f"model.layers.{layer}."
        out |= {
            f"{base}self_attn.q_proj.weight": q, f"{base}self_attn.k_proj.weight": k,
            f"{base}self_attn.v_proj.weight": v, f"{base}self_attn.o_proj.weight": o,
            f"{base}mlp.gate_proj.weight": gate, f"{base}mlp.up_proj.weight": up, f"{base}mlp.down_proj.weight": down,
            f"{base}input_layernorm.weight": torch.ones(width),
            f"{base}post_attention_layernorm.weight": torch.ones(width),
        }  # fmt: skip
    return {name: value.to(dtype).contiguous() for name, value in out.items()}
