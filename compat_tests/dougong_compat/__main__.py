"""``python -m dougong_compat``."""

from dougong_compat.commands.app import main

main()
