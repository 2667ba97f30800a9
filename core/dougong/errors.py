"""The exceptions of dougong, one small tree.

    DougongError
    ├── ConfigError                 an option, a config file or a combination of them
    │   └── UnsupportedModelError   a model this core refuses, with the reason
    ├── PluginError                 a plugin that cannot be used
    │   ├── PluginLoadError         it failed to import or to register
    │   ├── PluginAbiError          it was built for another contract version
    │   └── PluginAnswerError       a hook answered with a wrong type or value
    ├── BackendNotFoundError        the backend asked for is missing or has no device
    ├── KernelSelectionError        no kernel can do what the model needs
    ├── ModelLoadError              weights or config missing, corrupt or not matching
    ├── CacheMemoryError            the KV cache does not fit in the device's memory
    ├── InvalidRequestError         one request is wrong; the others go on (also a ValueError)
    └── EngineError                 a step failed; the requests in it carry the cause
        ├── DeviceLostError         the device answers no more; the engine has ended
        └── NumericalError          a row produced NaN logits

A message says what was asked, what was found, what is allowed and what to do. Nothing here imports
anything, so that every floor can raise.
"""

from __future__ import annotations

__all__ = [
    "BackendNotFoundError",
    "CacheMemoryError",
    "ConfigError",
    "DeviceLostError",
    "DougongError",
    "EngineError",
    "InvalidRequestError",
    "KernelSelectionError",
    "ModelLoadError",
    "NumericalError",
    "PluginAbiError",
    "PluginAnswerError",
    "PluginError",
    "PluginLoadError",
    "UnsupportedModelError",
]


class DougongError(Exception):
    """Root of every error that dougong raises on purpose."""


class ConfigError(DougongError):
    """An option has a value that cannot be used, or options contradict one another."""


class UnsupportedModelError(ConfigError):
    """The model's architecture is one that this core refuses; the message names the reason."""


class PluginError(DougongError):
    """A plugin cannot be used.

    ``plugin`` is the entry point's name, ``version`` the distribution's version where known.
    """

    def __init__(self, message: str, *, plugin: str = "", version: str = "") -> None:
        super().__init__(message)
        self.plugin = plugin
        self.version = version


class PluginLoadError(PluginError):
    """A plugin failed to import or to register; ``__cause__`` is the original exception."""


class PluginAbiError(PluginError):
    """A plugin was built for a contract version that this core does not speak."""


class PluginAnswerError(PluginError):
    """A plugin's hook answered with a wrong type or with values that contradict the contract."""


class BackendNotFoundError(DougongError):
    """The backend asked for is not installed, was refused, or has no device on this machine."""


class KernelSelectionError(DougongError):
    """No installed kernel can do what the model needs; the message lists each one's refusal."""


class ModelLoadError(DougongError):
    """A model's files are missing, corrupt, do not match one another, or do not fit in the device's memory."""


class CacheMemoryError(DougongError):
    """The KV cache does not fit; the message says how much does and which option to change."""


class InvalidRequestError(DougongError, ValueError):
    """A request has values that cannot be served. Other requests are not affected."""


class EngineError(DougongError):
    """A step failed. Requests that were part of it end with this cause."""


class DeviceLostError(EngineError):
    """The device answers no more: all requests end with this cause, and the engine with them. A new process may find
    it well again."""


class NumericalError(EngineError):
    """The logits of a request held NaN, so no token could be chosen for it."""
