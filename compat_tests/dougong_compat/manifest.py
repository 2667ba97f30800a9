"""What a backend says it can do, in the suite's words, and what a case therefore may expect.

Capability names: ``dtype:float32``, ``kv:int8``, ``layout:nhd``, ``block:16``, ``dim:64``, ``ratio:4`` (H/K),
``feature:window`` (the contract's feature names), ``cache:strided``, ``cache:giant``, ``host_lengths_absent``,
``graphs``, ``deterministic``, ``batch_invariant``, ``op:rope``, ``engine``. A manifest that lists none of a family
(``dims = "any"``) declares all of it.
"""

from __future__ import annotations

import datetime
import fnmatch
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Manifest", "ManifestError", "Waiver", "derive", "find", "read"]

#: Families whose members a manifest lists, and the TOML key of each.
FAMILIES = {
    "dtype": "dtypes", "kv": "kv_dtypes", "layout": "layouts", "block": "block_sizes", "dim": "head_dims",
    "ratio": "ratios", "feature": "features", "cache": "caches", "op": "ops",
}  # fmt: skip
#: Families whose every member the suite knows: another name is a slip, which would declare nothing.
MEMBERS = {
    "feature": ("alibi", "dv", "latent", "lse", "noncausal", "ragged", "sinks", "softcap", "window"),
    "cache": ("giant", "strided"),
}
FLAGS = ("host_lengths_absent", "graphs", "deterministic", "batch_invariant", "engine", "kv_manager")
_LONGEST_WAIVER = 90


class ManifestError(Exception):
    """A manifest that cannot be read or says something impossible: a usage error."""


@dataclass(frozen=True)
class Waiver:
    """A failure that is known and tracked: ``case`` is a glob over ids."""

    case: str
    issue: str
    expires: datetime.date
    reason: str = ""


@dataclass(frozen=True)
class Manifest:
    """``families``: family -> its declared members, None for all. ``flags``: declared yes-or-no capabilities."""

    backend: str
    families: Mapping[str, frozenset[str] | None]
    flags: frozenset[str]
    tolerance: str = "strict"
    waivers: tuple[Waiver, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def declares(self, capability: str) -> bool:
        family, _, member = capability.partition(":")
        if not member:
            return capability in self.flags
        listed = self.families.get(family, frozenset())
        return listed is None or member in listed

    def undeclared(self, needs: Sequence[str]) -> list[str]:
        return [need for need in needs if not self.declares(need)]

    def waiver(self, case_id: str, today: datetime.date) -> Waiver | None:
        return next((w for w in self.waivers if fnmatch.fnmatchcase(case_id, w.case) and w.expires >= today), None)

    def problems(self, today: datetime.date) -> list[str]:
        """Waivers that break the rules."""
        found = []
        if not self.flags and not any(members is None or members for members in self.families.values()):
            found.append("the manifest declares no capability at all")
        for waiver in self.waivers:
            if not waiver.issue.startswith(("http://", "https://")):
                found.append(f"waiver {waiver.case!r} names no issue's address: {waiver.issue!r}")
            if (waiver.expires - today).days > _LONGEST_WAIVER:
                found.append(
                    f"waiver {waiver.case!r} expires on {waiver.expires}, more than {_LONGEST_WAIVER} days away"
                )
            if waiver.expires < today:
                found.append(f"waiver {waiver.case!r} expired on {waiver.expires}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "source": self.source,
            "tolerance": self.tolerance,
            "capabilities": {
                **{
                    FAMILIES[family]: "any" if members is None else sorted(members)
                    for family, members in self.families.items()
                },
                **{flag: flag in self.flags for flag in FLAGS},
            },
            "waivers": [
                {"case": w.case, "issue": w.issue, "expires": w.expires.isoformat(), "reason": w.reason}
                for w in self.waivers
            ],
        }


def read(text: str, source: str = "") -> Manifest:
    """Parse a manifest in TOML.

    Raises:
        ManifestError: naming the key and what is allowed.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{source}: {error}") from error
    unknown = set(data) - {"backend", "tolerance", "capabilities", "waivers"}
    caps = data.get("capabilities", {})
    unknown |= {f"capabilities.{key}" for key in set(caps) - set(FAMILIES.values()) - set(FLAGS)}
    if unknown:
        raise ManifestError(f"{source}: unknown keys {sorted(unknown)}; see docs/conformance.md")
    families: dict[str, frozenset[str] | None] = {}
    for family, key in FAMILIES.items():
        value = caps.get(key, [])
        if value != "any" and not isinstance(value, list):
            raise ManifestError(f"{source}: capabilities.{key} is {value!r}; a list, or 'any'")
        members = None if value == "any" else frozenset(str(item) for item in value)
        strange = sorted((members or frozenset()) - set(MEMBERS[family])) if family in MEMBERS else []
        if strange:
            known = ", ".join(MEMBERS[family])
            raise ManifestError(f"{source}: capabilities.{key} names {', '.join(strange)}; there are {known}")
        families[family] = members
    for flag in FLAGS:
        if not isinstance(caps.get(flag, False), bool):
            raise ManifestError(f"{source}: capabilities.{flag} is {caps[flag]!r}; true or false")
    tolerance = data.get("tolerance", "strict")
    if tolerance not in ("strict", "relaxed"):
        raise ManifestError(f"{source}: tolerance = {tolerance!r}; 'strict' or 'relaxed'")
    waivers = []
    for entry in data.get("waivers", []):
        try:
            expires = entry["expires"]
            if isinstance(expires, str):
                expires = datetime.date.fromisoformat(expires)
            waivers.append(Waiver(entry["case"], entry["issue"], expires, entry.get("reason", "")))
        except (KeyError, ValueError, TypeError) as error:
            raise ManifestError(f"{source}: a waiver needs case, issue and expires (a date): {error}") from error
    flags = frozenset(flag for flag in FLAGS if caps.get(flag))
    return Manifest(str(data.get("backend", "")), families, flags, tolerance, tuple(waivers), source)


def derive(facts: Mapping[str, Any]) -> Manifest:
    """A manifest from what the backend's kernels declare of themselves, where no file was written."""
    kernels = facts["kernels"]
    features = {feature for kernel in kernels for feature in kernel["features"]}
    dtypes = {dtype for kernel in kernels for dtype in kernel["dtypes"]} or set(facts["dtypes"])
    layouts = [layout["name"] for layout in facts["layouts"] if layout["planes"]]
    used = {name for kernel in kernels for name in kernel["layouts"]} or set(layouts)
    blocks = {str(size) for layout in facts["layouts"] if layout["name"] in used for size in layout["blocks"]}
    kv = {feature.removeprefix("kv_") for feature in features if feature.startswith("kv_")}
    names = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp8_e4m3fnuz": "float8_e4m3fnuz"}
    families: dict[str, frozenset[str] | None] = {
        "dtype": frozenset(dtypes),
        "kv": frozenset(names[name] for name in kv if name in names),
        "layout": frozenset(used & set(layouts)),
        "block": frozenset(blocks),
        "dim": frozenset({"64", "128"}),
        "ratio": frozenset({"1", "4", "8"}),
        "feature": frozenset(features),
        "cache": frozenset({"strided"} & features),
        "op": None,
    }
    flags = {"kv_manager"}
    if any(kernel["batch_invariant"] for kernel in kernels):
        flags.add("batch_invariant")
    if facts["graphs"] and any(kernel["graph"] != "none" for kernel in kernels):
        flags.add("graphs")
    if kernels and not any(kernel["needs_host_lengths"] for kernel in kernels):
        flags.add("host_lengths_absent")
    return Manifest(facts["backend"], families, frozenset(flags), source="derived from the kernels' own declarations")


def _beside(module: str) -> Path | None:
    """The compat.toml in a module's package. Nothing is imported: plugins run in the worker."""
    top, *rest = module.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder, *rest, "compat.toml")
        if file.is_file():
            return file
    return None


def find(facts: Mapping[str, Any], path: str | None = None, modules: Sequence[str] = ()) -> Manifest:
    """The manifest for a backend: the file named, the suite's own for backends whose duties are written here,
    ``compat.toml`` in its plugin's package, or one derived from its kernels.

    Raises:
        ManifestError: it cannot be read, or is another backend's.
    """
    name = str(facts["backend"])
    text, source = "", ""
    if path:
        try:
            text, source = Path(path).read_text(encoding="utf-8"), path
        except OSError as error:
            raise ManifestError(f"manifest {path}: {error}") from error
    else:
        own = resources.files("dougong_compat") / "manifests" / f"{name}.toml"
        if own.is_file():
            text, source = own.read_text(encoding="utf-8"), f"dougong_compat/manifests/{name}.toml"
        for module in [*modules, f"dougong_{name.replace('-', '_')}"] if not text else ():
            file = _beside(module)
            if file is not None:
                text, source = file.read_text(encoding="utf-8"), f"{module}/compat.toml"
                break
    if not text:
        return derive(facts)
    manifest = read(text, source)
    if manifest.backend and manifest.backend != name:
        raise ManifestError(f"{source} is backend {manifest.backend!r}'s, not {name!r}'s")
    return Manifest(
        name, manifest.families, manifest.flags, manifest.tolerance, manifest.waivers, manifest.source, manifest.notes
    )
