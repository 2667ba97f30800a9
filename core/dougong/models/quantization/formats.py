"""Which format each matrix of a model is kept in."""

from __future__ import annotations

from dataclasses import dataclass

from dougong.errors import ConfigError
from dougong.plugins import Plugins, resolve_target

__all__ = ["WeightFormat", "find_format"]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A named choice. ``linear`` and ``head`` are formats of ``dougong.hal.LinearQuery``.

    ``linear`` is that of the layers' matrices, ``head`` that of the LM head, tied or not; norms, biases, routers and
    the embedding that tokens are looked up in stay in the model's dtype. A plugin's QuantizationSpec names
    an instance of this class, or a callable that returns one.
    """

    name: str
    linear: str = "dense"
    head: str = "dense"
    group_size: int = 32


#: The LM head stays at 8 bits beside 4-bit layers: it is where rounding costs most, and GGUF files do the same.
_BUILT_IN = {
    "none": WeightFormat(name="none"),
    "int8": WeightFormat(name="int8", linear="int8", head="int8"),
    "int4": WeightFormat(name="int4", linear="int4", head="int8"),
    # Activations are rounded too: the head keeps the model's dtype.
    "fp8": WeightFormat(name="fp8", linear="fp8"),
}


def find_format(name: str | None, plugins: Plugins | None = None) -> WeightFormat:
    """The format called ``name``; None is the model's dtype.

    Raises:
        ConfigError: no such format; those known are listed.
    """
    if name is None:
        return _BUILT_IN["none"]
    known = dict.fromkeys(key for key in _BUILT_IN if key != "none")
    if name in known:
        return _BUILT_IN[name]
    for plugin, spec in plugins.records("dougong_quantizations") if plugins is not None else []:
        if spec.name == name:
            found = resolve_target(spec.target)
            found = found if isinstance(found, WeightFormat) else found()
            if not isinstance(found, WeightFormat):
                raise ConfigError(f"plugin {plugin!r}: {spec.target} is no WeightFormat and makes none.")
            return found
        known[spec.name] = None
    raise ConfigError(f"quantization={name!r}: known are {', '.join(known)}, or None for the model's dtype.")
