"""Weight formats: which layers are kept in fewer bits, and slicing and joining weights that are."""

from dougong.models.quantization.formats import WeightFormat, find_format
from dougong.models.quantization.rows import join_rows, slice_weight, take_rows

__all__ = ["WeightFormat", "find_format", "join_rows", "slice_weight", "take_rows"]
