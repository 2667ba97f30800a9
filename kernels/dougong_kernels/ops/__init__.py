"""The hal's functional ops in Triton; signatures and meanings are those of `dougong.hal.ops`."""
