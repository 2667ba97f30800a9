"""The suite tested on itself: honest backends that must pass, planted bugs and cheats that must not."""
