"""Which function ranks requests behind ``scheduling_policy=``."""

from __future__ import annotations

import difflib

from dougong.errors import ConfigError, PluginAnswerError
from dougong.plugins import Plugins, resolve_target
from dougong.scheduling import POLICIES, Policy

__all__ = ["find_policy"]


def find_policy(name: str, plugins: Plugins) -> Policy:
    """The core's policy of that name, or a plugin's.

    Raises:
        ConfigError: nobody offers it.
        PluginAnswerError: a plugin's cannot be imported or called.
    """
    if name in POLICIES:
        return POLICIES[name]
    offered = {spec.name: (plugin, spec) for plugin, spec in plugins.records("dougong_schedulers")}
    if name not in offered:
        known = sorted({*POLICIES, *offered})
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"scheduling_policy={name!r}: no plugin offers it.{hint} Known are: {', '.join(known)}.")
    plugin, spec = offered[name]
    try:
        policy: Policy = resolve_target(spec.target)
    except (ImportError, AttributeError) as error:
        raise PluginAnswerError(
            f"plugin {plugin!r} offers scheduling policy {name!r} as {spec.target}, which cannot be imported: {error}",
            plugin=plugin,
        ) from error
    if not callable(policy):
        raise PluginAnswerError(
            f"plugin {plugin!r}: {spec.target} is {policy!r}; expected a function (request, order of arrival, step, "
            "config) -> rank.",
            plugin=plugin,
        )
    return policy
