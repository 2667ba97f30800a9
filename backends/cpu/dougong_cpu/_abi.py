"""The C structs of ``native/abi.h`` as ctypes sees them. Sizes are checked when the library is loaded."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

__all__ = ["FORMATS", "STRUCTS", "Attention", "Linear", "Norm", "Rope", "Write"]

#: Weight formats of ``DgFormat``.
FORMATS = {"f32": 0, "bf16": 1, "f16": 2, "i8_channel": 3, "i8_group": 4, "i4_min": 5, "i4_sym": 6}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Attention(Structure):
    """``DgAttention``: one call of paged or ragged attention."""

    _fields_ = [
        *_fields(c_void_p, "q k v out lse cu_q kv_len block_table cu_k slopes sinks k_scale v_scale"),
        *_fields(c_int64, "q_st q_sh q_sd k_sb k_sn k_sh k_sd v_sb v_sn v_sh v_sd"),
        *_fields(c_int64, "o_st o_sh o_sd lse_st lse_sh bt_sb"),
        *_fields(c_int32, "rows heads kv_heads dim dim_v block q_dtype kv_dtype causal window"),
        *_fields(c_int32, "k_scale_stride v_scale_stride"),
        *_fields(c_float, "scale softcap"),
        *_fields(c_int32, "threads span"),
    ]


class Write(Structure):
    """``DgWrite``: storing new tokens' K and V at their slots."""

    _fields_ = [
        *_fields(c_void_p, "k v k_cache v_cache slots k_scale v_scale"),
        *_fields(c_int64, "k_st k_sh v_st v_sh kc_sb kc_sn kc_sh kc_sd vc_sb vc_sn vc_sh vc_sd"),
        *_fields(c_int32, "tokens kv_heads dim dim_v block dtype cache_dtype k_scale_stride v_scale_stride reserved"),
    ]


class Rope(Structure):
    """``DgRope``: QK-norm, rope and cache write of one packed QKV."""

    _fields_ = [
        ("write", Write),
        *_fields(c_void_p, "q q_out cos sin positions q_norm k_norm"),
        *_fields(c_int64, "q_st q_sh qo_st qo_sh table_stride"),
        *_fields(c_int32, "heads rotary_dim interleaved"),
        *_fields(c_float, "norm_offset eps"),
        *_fields(c_int32, "write_cache norm_dtype reserved"),
    ]


class Norm(Structure):
    """``DgNorm``: RMS norm, with a residual added first where ``residual_in`` is given."""

    _fields_ = [
        *_fields(c_void_p, "x w residual_in residual_out y"),
        *_fields(c_int64, "x_st r_st ro_st y_st"),
        *_fields(c_int32, "rows n dtype w_dtype"),
        *_fields(c_float, "offset eps"),
        *_fields(c_int32, "reserved0 reserved1"),
    ]


class Linear(Structure):
    """``DgLinear``: one product with a packed weight."""

    _fields_ = [
        *_fields(c_void_p, "x w bias y"),
        *_fields(c_int64, "x_st y_st"),
        *_fields(c_int32, "m n k x_dtype y_dtype format group threads"),
    ]


STRUCTS: tuple[type[ctypes.Structure], ...] = (Attention, Write, Rope, Norm, Linear)
