"""Which class is behind ``kv_connector=``."""

from __future__ import annotations

import difflib
from dataclasses import replace

from dougong.errors import ConfigError, PluginAnswerError
from dougong.plugins import ABI, KVConnector, KVConnectorSpec, KVContext, Plugins, resolve_target

__all__ = ["BUILT_IN", "open_connector"]

BUILT_IN: tuple[KVConnectorSpec, ...] = (
    KVConnectorSpec(
        name="shared_memory", abi=ABI, target="dougong.connectors.shared_memory:SharedMemoryConnector",
        options={"name": "default", "size_mib": 1024},
    ),
)  # fmt: skip


def open_connector(name: str, context: KVContext, plugins: Plugins | None = None) -> KVConnector:
    """Make the connector ``name`` for an engine; a plugin's goes before the core's own of that name.

    Raises:
        ConfigError: nobody offers it, or it refuses its options.
        PluginAnswerError: its class cannot be imported or is no KVConnector.
    """
    offered = {spec.name: ("dougong", spec) for spec in BUILT_IN}
    for plugin, spec in plugins.records("dougong_kv_connectors") if plugins is not None else []:
        offered[spec.name] = (plugin, spec)
    if name not in offered:
        near = difflib.get_close_matches(name, offered, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"kv_connector={name!r}: no plugin offers it.{hint} Known are: {', '.join(sorted(offered))}.")
    plugin, spec = offered[name]
    try:
        kind = resolve_target(spec.target)
    except (ImportError, AttributeError) as error:
        raise PluginAnswerError(
            f"plugin {plugin!r} offers KV connector {name!r} as {spec.target}, which cannot be imported: {error}",
            plugin=plugin,
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, KVConnector)):
        raise PluginAnswerError(f"plugin {plugin!r}: {spec.target} is no KVConnector.", plugin=plugin)
    return kind(replace(context, options={**spec.options, **context.options}))
