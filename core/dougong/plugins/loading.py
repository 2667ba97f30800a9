"""Finding, filtering and checking plugins.

Entry points are filtered by name before import and loaded one by one, so that a broken plugin is reported
by name and does not hide the others. A plugin that cannot be used stops the start, unless it is excluded
on purpose (``DOUGONG_PLUGINS=-name``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from dougong.errors import ConfigError, PluginAbiError, PluginAnswerError, PluginError, PluginLoadError
from dougong.plugins import hookspecs
from dougong.plugins.records import (
    ABI,
    Abi,
    BackendSpec,
    KernelSpec,
    KVConnectorSpec,
    ModelSpec,
    QuantizationSpec,
    SchedulerSpec,
)

__all__ = ["ENV_PLUGINS", "GROUP", "LoadedPlugin", "PluginFilter", "Plugins", "load_plugins"]

GROUP = "dougong"
ENV_PLUGINS = "DOUGONG_PLUGINS"

_RECORDS: dict[str, type] = {
    "dougong_backends": BackendSpec,
    "dougong_kernels": KernelSpec,
    "dougong_models": ModelSpec,
    "dougong_quantizations": QuantizationSpec,
    "dougong_schedulers": SchedulerSpec,
    "dougong_kv_connectors": KVConnectorSpec,
}


@dataclass(frozen=True)
class PluginFilter:
    """Which plugins may be loaded: ``"a,b"`` pins exactly these, ``"-a,-b"`` loads all but these."""

    pinned: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> PluginFilter:
        """Read the value of ``DOUGONG_PLUGINS``.

        Raises:
            ConfigError: it both pins and excludes, or holds an empty name.
        """
        parts = [part.strip() for part in text.split(",") if part.strip()]
        pinned = frozenset(part for part in parts if not part.startswith("-"))
        excluded = frozenset(part[1:].strip() for part in parts if part.startswith("-"))
        if (pinned and excluded) or "" in excluded:
            raise ConfigError(
                f"{ENV_PLUGINS}={text!r}: either pin plugins ('cpu,sim': only these are loaded) or exclude some "
                "('-sim': all but these); not both."
            )
        return cls(pinned, excluded)

    def allows(self, name: str) -> bool:
        return name in self.pinned if self.pinned else name not in self.excluded


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin's fate. ``error`` is None when it is in use; ``skipped`` when the filter left it out."""

    name: str
    distribution: str
    version: str
    module: str
    error: PluginError | None = None
    skipped: bool = False


@dataclass
class Plugins:
    """The plugins in use, and the hooks through which they are asked."""

    manager: pluggy.PluginManager
    loaded: list[LoadedPlugin] = field(default_factory=list)

    def raise_errors(self) -> None:
        """Stop if any plugin could not be used.

        Raises:
            PluginError: the first one's, naming the plugin, its version, the cause and the way out.
        """
        for plugin in self.loaded:
            if plugin.error is not None:
                raise plugin.error

    def records(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Ask every plugin for ``hook``'s records; returns (plugin name, record), in a stable order.

        Raises:
            PluginAnswerError: an answer has a wrong type, or the hook raised.
            PluginAbiError: a record was built for another contract.
        """
        kind = _RECORDS.get(hook, object)
        found: list[tuple[str, Any]] = []
        for implementation in sorted(getattr(self.manager.hook, hook).get_hookimpls(), key=lambda i: i.plugin_name):
            name = implementation.plugin_name
            version = self.version(name)
            accepted = {key: arguments[key] for key in implementation.argnames}
            try:
                answer = implementation.function(*(accepted[key] for key in implementation.argnames))
                answer = [] if answer is None else list(answer)
            except Exception as error:
                raise PluginAnswerError(
                    f"plugin {name!r} {version}: {hook} raised {type(error).__name__}: {error}. "
                    f"Mend or upgrade it, or exclude it with {ENV_PLUGINS}=-{name}.",
                    plugin=name,
                    version=version,
                ) from error
            for record in answer:
                if not isinstance(record, kind):
                    raise PluginAnswerError(
                        f"plugin {name!r} {version}: {hook} answered {record!r} ({type(record).__name__}); expected "
                        f"an iterable of {kind.__name__}. Upgrade it, or exclude it with {ENV_PLUGINS}=-{name}.",
                        plugin=name,
                        version=version,
                    )
                if hasattr(record, "abi"):
                    check_abi(record.abi, name, version)
                found.append((name, record))
        return found

    def version(self, name: str) -> str:
        return next((plugin.version for plugin in self.loaded if plugin.name == name), "")


def check_abi(abi: Abi, plugin: str, version: str, spoken: Abi = ABI) -> None:
    """Refuse another major, or a newer minor. Before 1.0 the minor must be equal.

    Raises:
        PluginAbiError: with both versions named.
    """
    major_ok = abi[0] == spoken[0]
    minor_ok = abi[1] == spoken[1] if spoken[0] == 0 else abi[1] <= spoken[1]
    if major_ok and minor_ok:
        return
    newer = abi > spoken
    raise PluginAbiError(
        f"plugin {plugin!r} {version} was built for contract {abi[0]}.{abi[1]}; this dougong speaks "
        f"{spoken[0]}.{spoken[1]}. Upgrade {'dougong' if newer else 'the plugin'}, or exclude it with "
        f"{ENV_PLUGINS}=-{plugin}.",
        plugin=plugin,
        version=version,
    )


def load_plugins(
    names: str | None = None,
    *,
    entries: Iterable[EntryPoint] | None = None,
    extra: Sequence[tuple[str, Any]] = (),
    strict: bool = True,
) -> Plugins:
    """Load the installed plugins.

    Args:
        names: a filter as in ``DOUGONG_PLUGINS``; None reads that variable.
        entries: entry points to use in place of the installed ones (tests).
        extra: (name, module or object) pairs to register as well, past the filter.
        strict: raise for the first plugin that cannot be used; otherwise keep its error in ``loaded``.

    Raises:
        PluginError: a plugin failed to import or register (strict only).
        ConfigError: the filter pins a plugin that is not installed.
    """
    chosen = PluginFilter.parse(os.environ.get(ENV_PLUGINS, "") if names is None else names)
    found = sorted(entry_points(group=GROUP) if entries is None else entries, key=lambda entry: entry.name)
    missing = chosen.pinned - {entry.name for entry in found}
    if missing:
        raise ConfigError(
            f"{ENV_PLUGINS} pins {sorted(missing)}, which are not installed. "
            f"Installed are {[entry.name for entry in found] or 'none'}."
        )
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager)
    seen: set[str] = set()
    for entry in found:
        if entry.name in seen:  # an editable install beside a wheel lists the same entry twice
            continue
        seen.add(entry.name)
        plugins.loaded.append(_load_one(manager, entry, chosen))
    for name, module in extra:
        manager.register(module, name=name)
        plugins.loaded.append(LoadedPlugin(name, "", "", getattr(module, "__name__", repr(module))))
    if strict:
        plugins.raise_errors()
    return plugins


def _load_one(manager: pluggy.PluginManager, entry: EntryPoint, chosen: PluginFilter) -> LoadedPlugin:
    distribution = entry.dist.name if entry.dist else ""
    version = entry.dist.version if entry.dist else ""
    if not chosen.allows(entry.name):
        return LoadedPlugin(entry.name, distribution, version, entry.value, skipped=True)
    error: PluginError | None = None
    label = f"plugin {entry.name!r} ({distribution or 'unknown distribution'} {version or 'unknown version'})"
    remedy = f"Mend or upgrade it, or exclude it with {ENV_PLUGINS}=-{entry.name}."
    try:
        module = entry.load()
    except BaseException as cause:
        if isinstance(cause, (KeyboardInterrupt, SystemExit)):
            raise
        error = PluginLoadError(
            f"{label} failed to import {entry.value}: {type(cause).__name__}: {cause}. {remedy}",
            plugin=entry.name,
            version=version,
        )
        error.__cause__ = cause
        return LoadedPlugin(entry.name, distribution, version, entry.value, error)
    try:
        manager.register(module, name=entry.name)
        _check_hooks(manager, entry.name)
    except (pluggy.PluginValidationError, ValueError) as cause:
        if manager.has_plugin(entry.name):
            manager.unregister(name=entry.name)
        error = PluginLoadError(
            f"{label} does not fit the hooks: {cause}. {remedy}", plugin=entry.name, version=version
        )
        error.__cause__ = cause
    return LoadedPlugin(entry.name, distribution, version, entry.value, error)


def _check_hooks(manager: pluggy.PluginManager, name: str) -> None:
    """Reject hooks that the core does not know: a misspelt hook would otherwise be ignored in silence."""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ValueError(f"unknown hook in {name!r}: {error}") from error
