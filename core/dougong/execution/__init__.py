"""Running a model step by step: persistent batch, staging, model runner, graphs, sampler, ranks."""

from dougong.execution.result import PendingStep, StepResult, TokenLogprobs
from dougong.execution.runner import ModelRunner
from dougong.execution.timings import StepTimings

__all__ = ["ModelRunner", "PendingStep", "StepResult", "StepTimings", "TokenLogprobs"]
