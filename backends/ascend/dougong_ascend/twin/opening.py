"""Importing this makes the process the twin, then gives the backend's own device."""

from dougong_ascend.twin import install

install()

from dougong_ascend.device import AscendDevice  # noqa: E402 - torch_npu exists only from here on

__all__ = ["AscendDevice"]
