"""The commands of ``dougong compat``."""
