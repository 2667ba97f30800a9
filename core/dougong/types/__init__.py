"""Value types that every floor shares. Pure Python: nothing here imports torch."""

from dougong.types.finish import FinishReason
from dougong.types.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimes
from dougong.types.sampling import SamplingParams
from dougong.types.structured import StructuredOutput

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "RequestOutput",
    "RequestTimes",
    "SamplingParams",
    "StructuredOutput",
]
