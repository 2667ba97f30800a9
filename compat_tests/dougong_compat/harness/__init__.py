"""What stands around a backend's call: hostile memory, hostile tables, and the checks afterwards."""
