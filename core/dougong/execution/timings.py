"""Where the host's time of a step goes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StepTimings"]


@dataclass(slots=True)
class StepTimings:
    """Seconds of one step on the host, by part. ``wait`` is known once the result was asked for."""

    stage: float = 0.0
    """Reading the plan, filling the staging buffer, the copy to the device."""
    launch: float = 0.0
    """The attention kernels' plans and the model's forward, or a graph's replay."""
    sample: float = 0.0
    """Choosing tokens, and sending them on their way to the host."""
    wait: float = 0.0
    """Waiting for the sampled ids."""
    graph: bool = False
    """Whether the forward was a replay."""

    @property
    def total(self) -> float:
        return self.stage + self.launch + self.sample + self.wait
