"""Building cases: names, needs, profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dougong_compat.case import Case
from dougong_compat.problem import DEFAULTS

__all__ = ["BATCHES", "FEATURES", "attention_case", "attention_needs", "slug", "variants_case"]

#: Batches by name: rows of [q_len, kv_len], lengths in tokens or in blocks (``"2b+1"``). Decode rows come first.
BATCHES: dict[str, list[list[int | str]]] = {
    "decode": [[1, "b-1"], [1, "b"], [1, "b+1"], [1, "2b+3"]],
    "single": [[1, "3b+1"]],
    "extend": [[5, "2b+1"], [3, "b+3"]],
    "prefill": [[1, 1], [7, 7], [17, 17]],
    "mixed": [[1, "2b"], [1, 3], [4, "b+2"], [9, 9]],
    "zeros": [[1, "b"], [0, 0], [3, 5], [0, "b+1"], [2, 2]],
    "past": [[1, 0], [4, 2], [3, 0], [6, "b+1"]],
    "long": [[1, 300], [1, 457], [1, 33]],
    "longextend": [[16, 260], [3, 513]],
}

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lse": {"lse": True},
    "softcap": {"softcap": 20.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "noncausal": {"causal": False},
    "softcap_alibi": {"softcap": 5.0, "alibi": True, "lse": True},
    "sinks_softcap": {"sinks": True, "softcap": 30.0, "lse": True},
    "sinks_alibi": {"sinks": True, "alibi": True, "lse": True},
    "int8": {"kv": "int8", "k_scale": 0.03125, "v_scale": 0.05},
    "fp8": {"kv": "float8_e4m3fn", "k_scale": 0.5, "v_scale": 2.0},
    "scale": {"scale": 0.3},
}

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_NAMES = {
    "dtype": "",
    "kv": "kv-",
    "layout": "",
    "block": "n",
    "D": "d",
    "Dv": "dv",
    "window": "w",
    "softcap": "cap",
    "scale": "s",
    "k_scale": "ks",
    "v_scale": "vs",
    "tail": "tail-",
    "table_tail": "table-",
    "stride": "",
    "width": "wide",
    "slack": "slack",
    "values": "",
    "dead": "dead-",
    "shared": "share",
    "page_seed": "page",
    "spare": "spare",
}
_FLAGS = {
    "alibi": ("", "alibi"),
    "sinks": ("", "sinks"),
    "causal": ("noncausal", ""),
    "lse": ("", "lse"),
    "latent": ("", "latent"),
    "q_pack": ("", "qpack"),
    "host_len": ("nohost", ""),
    "write": ("", "write"),
    "guard": ("", "guard"),
    "ragged": ("", "ragged"),
    "scale_tensor": ("", "scalet"),
    "identity": ("", "identity"),
}


def slug(params: Mapping[str, Any]) -> str:
    """A short name of the parameters that are not as usual, always in the same order."""
    parts = [f"h{params.get('H', DEFAULTS['H'])}k{params.get('K', DEFAULTS['K'])}"]
    for key, prefix in _NAMES.items():
        value = params.get(key, DEFAULTS[key])
        if value == DEFAULTS[key] and key != "D":
            continue
        text = _SHORT.get(str(value), str(value))
        parts.append(f"{prefix}{text}".replace(" ", ""))
    for key, (no, yes) in _FLAGS.items():
        default = False if key == "lse" else DEFAULTS[key]
        value = params.get(key, default)
        if value != default:
            parts.append(yes if value else no)
    return "-".join(part for part in parts if part)


def attention_needs(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The capabilities that a backend must declare for these parameters to be expected of it."""
    p = {**DEFAULTS, "lse": False, **params}
    needs = [f"dim:{p['D']}", f"ratio:{p['H'] // p['K']}"]
    if p["dtype"] != "own":
        needs.append(f"dtype:{p['dtype']}")
    if p["kv"]:
        needs.append(f"kv:{p['kv']}")
    if p["layout"] != "own":
        needs.append(f"layout:{p['layout']}")
    if p["block"]:
        needs.append(f"block:{p['block']}")
    named = {
        "window": p["window"] is not None, "softcap": p["softcap"] is not None, "alibi": p["alibi"],
        "sinks": p["sinks"], "lse": p["lse"], "noncausal": not p["causal"], "latent": p["latent"],
        "ragged": p["ragged"], "dv": bool(p["Dv"]) and p["Dv"] != p["D"] and not p["latent"],
    }  # fmt: skip
    needs += [f"feature:{name}" for name, used in named.items() if used]
    if p["stride"] in ("giant", "wide"):
        needs.append("cache:giant")
    elif p["stride"] != "plain":
        needs.append("cache:strided")
    if not p["host_len"]:
        needs.append("host_lengths_absent")
    return tuple(needs)


def attention_case(
    group: str, name: str, params: Mapping[str, Any], *, level: str = "L1", kind: str = "attention", **more: Any
) -> Case:
    """A case of one call. ``lse`` is off unless asked for."""
    full = {"lse": False, **params}
    return Case(id=f"{level}/{group}/{name}", level=level, kind=kind, params=full, needs=attention_needs(full), **more)


def variants_case(
    group: str,
    name: str,
    base: Mapping[str, Any],
    changes: list[dict[str, Any]],
    *,
    level: str = "L2",
    needs: tuple[str, ...] = (),
    **more: Any,
) -> Case:
    """A case of one call and changes of it."""
    full = {"lse": False, **base}
    return Case(
        id=f"{level}/{group}/{name}",
        level=level,
        kind="variants",
        params={"base": full, "changes": changes},
        needs=attention_needs(full) + needs,
        **more,
    )
