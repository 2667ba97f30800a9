"""The package that ``dougong new-backend NAME`` writes."""
