"""L2: what paging must mean. Needles to the bit, changes that must not matter, splits that must agree, block copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.make import BATCHES, attention_case, slug, variants_case

__all__ = ["collect"]


def collect() -> Iterator[Case]:
    yield from _needles()
    yield from _metamorphic()
    yield from _splits()
    yield from _copies()
    yield from _conversions()


def _needles() -> Iterator[Case]:
    batches: dict[str, list[list[int | str]]] = {
        "decode": [[1, "b-1"], [1, "b"], [1, "b+1"], [1, "2b"]],
        "single": [[1, "3b+2"]],
        "extend": [[4, "b+2"], [3, "2b"]],
        "prefill": [[9, 9], [17, 17], [4, 4]],
        "mixed": [[1, "2b+1"], [5, "b+4"], [6, 6]],
    }
    for block in (0, 1, 8, 16, 32, 64):
        for name, rows in batches.items():
            for window, decoy in ((None, "future"), (None, "stale"), (8, "window"), (17, "window"), (8, "future")):
                for H, K in ((4, 4), (6, 1), (8, 2)):
                    if (window, H) in ((17, 6), (8, 4)) and name != "decode":
                        continue
                    params: dict[str, Any] = {
                        "rows": rows,
                        "block": block,
                        "window": window,
                        "decoy": decoy,
                        "H": H,
                        "K": K,
                        "D": 128,
                    }
                    if H == 6 and decoy == "stale":
                        params["table_tail"] = "zero"
                    plain = block == 0 and window is None
                    yield attention_case(
                        "needle/mask", f"{name}-{decoy}-{slug(params)}", params, level="L2", kind="needle",
                        mandatory=plain and H == 8, profile="smoke" if plain else "core",
                    )  # fmt: skip
    for dtype in ("float32", "bfloat16", "float16"):
        for layout in ("nhd", "hnd", "nz16", "x_packed"):
            for stride in ("plain", "gap", "interleaved", "layers"):
                for name in ("decode", "mixed"):
                    params = {
                        "rows": batches[name],
                        "block": 16,
                        "layout": layout,
                        "stride": stride,
                        "dtype": dtype,
                        "D": 64,
                    }
                    yield attention_case("needle/layout", f"{name}-{slug(params)}", params, level="L2", kind="needle")
    for kv in ("int8", "float8_e4m3fn"):
        for name in batches:
            for scales in ((1.0, 1.0), (2.0, 0.5), (0.25, 4.0)):
                params = {"rows": batches[name], "kv": kv, "k_scale": scales[0], "v_scale": scales[1], "D": 128}
                yield attention_case("needle/kv-dtype", f"{name}-{slug(params)}", params, level="L2", kind="needle")
    for D in (64, 80, 96, 112, 128, 192, 256):
        for block in (8, 16, 64):
            params = {"rows": batches["mixed"], "D": D, "block": block, "H": 5, "K": 1}
            yield attention_case("needle/dims", slug(params), params, level="L2", kind="needle")
    for shared in (1, 2, 3):
        for block in (0, 8, 16):
            shared_rows = [[1, "4b+1"], [1, "3b+2"], [2, "3b+4"], [1, "3b+1"]]
            params = {
                "rows": sorted(shared_rows, key=lambda r: r[0] != 1),
                "shared": shared,
                "block": block,
                "D": 128,
                "H": 4,
                "K": 1,
            }
            yield attention_case(
                "needle/shared-prefix", slug(params), params, level="L2", kind="needle", mandatory=block == 0
            )


_INERT: dict[str, dict[str, Any]] = {
    "renamed blocks": {"params": {"page_seed": 1}},
    "other renamed blocks": {"params": {"page_seed": 2, "spare": 9}},
    "another unwritten tail": {"params": {"tail": "loud"}},
    "another table tail": {"params": {"table_tail": "negative"}},
    "a zero table tail": {"params": {"table_tail": "zero"}},
    "a wider table": {"params": {"width": 11}},
    "identity blocks": {"params": {"identity": True}},
    # nothing in it shows that this is a test
    "what earlier requests left, in slots and table": {"params": {"tail": "stale", "table_tail": "zero"}},
}


def _metamorphic() -> Iterator[Case]:
    batches = ("decode", "single", "extend", "prefill", "mixed", "zeros", "past", "long")
    for batch in batches:
        for block in (0, 8, 16, 32, 64):
            for window in (None, 13):
                base: dict[str, Any] = {"rows": BATCHES[batch], "block": block, "window": window, "H": 4, "K": 1}
                changes = [{**change, "name": name} for name, change in _INERT.items()]
                plain = block == 0 and window is None
                yield variants_case(
                    "metamorphic/paging", f"{batch}-{slug(base)}", base, changes, mandatory=plain,
                    profile="smoke" if plain else "core",
                )  # fmt: skip
    for batch in ("decode", "mixed", "long", "zeros"):
        for dtype in ("own", "float32", "bfloat16", "float16"):
            base = {"rows": BATCHES[batch], "dtype": dtype, "H": 4, "K": 1}
            yield variants_case(
                "metamorphic/rows", f"{batch}-{slug(base)}", base,
                [{"redraw": [0], "name": "new values in row 0"}, {"redraw": [2], "name": "new values in row 2"}],
                mandatory=dtype == "own",
            )  # fmt: skip
            yield variants_case(
                "metamorphic/scale",
                f"{batch}-{slug(base)}",
                base,
                [
                    {"scale_q": 2, "name": "q doubled and scale halved"},
                    {"scale_q": 0.5, "name": "q halved and scale doubled"},
                ],
                mandatory=dtype == "own",
            )
    features: tuple[dict[str, Any], ...] = (
        {"softcap": 9.0},
        {"alibi": True},
        {"sinks": True},
        {"causal": False},
        {"kv": "int8", "k_scale": 0.03},
    )
    for feature in features:
        for batch in ("decode", "extend", "mixed"):
            base = {"rows": BATCHES[batch], **feature, "tail": "loud"}
            changes = [{**change, "name": name} for name, change in _INERT.items() if "tail" not in change["params"]]
            yield variants_case("metamorphic/feature", f"{batch}-{slug(base)}", base, changes)
    for window in (5, 16, 40):
        for block in (8, 16):
            base = {"rows": BATCHES["long"], "window": window, "block": block, "dead": "keep"}
            changes = [{"params": {"dead": "zero"}, "name": "blocks behind the window given back"}]
            yield variants_case("metamorphic/window", slug(base), base, changes)


def _splits() -> Iterator[Case]:
    """A prompt in one piece and in pieces, and behind a cached prefix: each must be right."""
    for block in (0, 8, 16, 32):
        for total in (1, 15, 16, 17, 33, 70):
            for chunk in (1, 7, 16, 64):
                if chunk >= total and chunk > 7:
                    continue
                whole = [[total, total]]
                changes = [
                    {"params": {"rows": [[min(chunk, total - at), at + min(chunk, total - at)]]}, "mode": "oracle",
                     "name": f"the chunk at {at}"}
                    for at in sorted({0, chunk, max(0, (total - 1) // chunk * chunk)}) if at < total
                ]  # fmt: skip
                base = {"rows": whole, "block": block, "H": 4, "K": 1, "write": True}
                yield variants_case(
                    "splits/chunks", f"{total}-by-{chunk}-{slug(base)}", base, changes, mandatory=block == 0
                )
    for shared in (1, 2, 4):
        for block in (0, 8, 16):
            rows = [[1, "5b"], [1, "4b+1"], [3, "5b+3"], ["b", "6b"]]
            cold = {"rows": rows, "block": block, "H": 4, "K": 1, "shared": shared}
            changes = [{"params": {"page_seed": 5}, "name": "another placement of the shared prefix"}]
            yield variants_case("splits/prefix-hit", f"{shared}-{slug(cold)}", cold, changes, mandatory=block == 0)


def _copies() -> Iterator[Case]:
    rows = [[1, 30], [1, 40]]
    lists: dict[str, tuple[list[int], list[int]]] = {
        "none": ([], []),
        "one": ([1], [3]),
        "fan-out": ([1, 1, 1], [2, 3, 4]),
        "two": ([4, 2], [1, 3]),
        "to-scratch": ([2], [0]),
        "last": ([1, 3], [5, 2]),
    }
    for name, (source, target) in lists.items():
        for layout in ("own", "nhd", "hnd", "nz16", "x_packed"):
            for dtype in ("own", "bfloat16"):
                for kv in ("", "int8"):
                    for layers in (1, 3):
                        params = {
                            "rows": rows,
                            "layout": layout,
                            "dtype": dtype,
                            "kv": kv,
                            "block": 0 if layout == "own" else 16,
                            "source": source,
                            "target": target,
                            "num_layers": layers,
                            "spare": 6,
                            "D": 64,
                        }
                        case = attention_case(
                            "copy/blocks", f"{name}-x{layers}-{slug(params)}", params, level="L2", kind="copy"
                        )
                        yield _storage_only(case)
    for stride in ("gap", "interleaved", "layers"):
        for name in ("one", "fan-out", "two"):
            source, target = lists[name]
            params = {
                "rows": rows, "layout": "nhd", "stride": stride, "block": 16, "source": source, "target": target,
                "num_layers": 2, "spare": 6,
            }  # fmt: skip
            yield _storage_only(
                attention_case("copy/strides", f"{name}-{slug(params)}", params, level="L2", kind="copy")
            )


def _storage_only(case: Case) -> Case:
    """Copies move bytes: they need the layout and nothing of attention."""
    kept = tuple(need for need in case.needs if need.startswith(("layout:", "cache:", "block:")))
    return Case(**{**case.__dict__, "needs": kept})


def _conversions() -> Iterator[Case]:
    layouts = ("nhd", "hnd", "nz16", "x_packed")
    for first in layouts:
        for second in layouts:
            for dtype, kv in (("float32", ""), ("bfloat16", ""), ("float16", "int8"), ("bfloat16", "float8_e4m3fn")):
                for through in (16, 32):
                    params = {
                        "rows": [[1, 70]], "layout": first, "block": 16, "dtype": dtype, "kv": kv, "through": second,
                        "through_block": through, "source": [1, 3], "target": [4, 2], "spare": 4, "D": 64,
                    }  # fmt: skip
                    case = attention_case(
                        "copy/convert", f"via-{second}{through}-{slug(params)}", params, level="L2", kind="convert"
                    )
                    yield _storage_only(case)
