"""Running a model step by step: persistent batch, staging, model runner, graphs, sampler, ranks."""

from dougong.execution.kv_blocks import KVBlocks
from dougong.execution.result import PendingStep, StepResult, TokenLogprobs
from dougong.execution.runner import ModelRunner
from dougong.execution.timings import StepTimings
from dougong.execution.transfer import HostCopies

__all__ = ["HostCopies", "KVBlocks", "ModelRunner", "PendingStep", "StepResult", "StepTimings", "TokenLogprobs"]
