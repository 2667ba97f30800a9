"""The meeting point of the core and its plugins: hooks, the records they return, and discovery.

A plugin is an entry point in group ``dougong``. Its module is import-light: it imports
``from dougong.plugins import hookimpl, BackendSpec`` and names its classes by string.
"""

from dougong.plugins.hookspecs import hookimpl, hookspec
from dougong.plugins.kv_connector import (
    KVBlockName,
    KVConnector,
    KVContext,
    KVFormat,
    KVGroupFormat,
    KVRole,
    KVTransferError,
)
from dougong.plugins.loading import LoadedPlugin, PluginFilter, Plugins, load_plugins
from dougong.plugins.observer import StepObserver, StepRecord
from dougong.plugins.records import (
    ABI,
    Abi,
    BackendSpec,
    KernelSpec,
    KVConnectorSpec,
    ModelSpec,
    Probe,
    QuantizationSpec,
    SchedulerSpec,
    resolve_target,
)

__all__ = [
    "ABI",
    "Abi",
    "BackendSpec",
    "KVBlockName",
    "KVConnector",
    "KVConnectorSpec",
    "KVContext",
    "KVFormat",
    "KVGroupFormat",
    "KVRole",
    "KVTransferError",
    "KernelSpec",
    "LoadedPlugin",
    "ModelSpec",
    "PluginFilter",
    "Plugins",
    "Probe",
    "QuantizationSpec",
    "SchedulerSpec",
    "StepObserver",
    "StepRecord",
    "hookimpl",
    "hookspec",
    "load_plugins",
    "resolve_target",
]
