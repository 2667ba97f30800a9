"""What a fleet is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dougong.errors import ConfigError

__all__ = ["FleetConfig"]


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Options of one fleet of replicas that serve the same model.

    Raises:
        ConfigError: a value is out of range.
    """

    engine: Mapping[str, Any] = field(default_factory=dict)
    """Options of `dougong.EngineConfig` that every replica has; ``backend`` is left to ``backends``."""
    backends: tuple[str, ...] = ()
    """One backend per replica; replica i of the fleet runs on the i-th. Empty: each takes the best it finds."""
    replicas: int = 0
    """Number of replicas; 0: as many as ``backends`` names, or one."""
    name: str = "dougong"
    """Name of the Serve application."""
    max_ongoing_requests: int = 256
    """Requests that a replica takes at once; more wait in the router."""
    prefix_block: int = 16
    """Tokens of a block by which prompts are compared."""
    prefix_blocks_kept: int = 1 << 18
    """Blocks that the router remembers, least recently used ones are forgotten."""
    imbalance: int = 8
    """A replica with a longer prefix is passed over when it has this many requests more than the idlest one."""
    health_check_period_s: float = 5.0
    health_check_timeout_s: float = 15.0
    drain_s: float = 60.0
    """Seconds that a replica which is being replaced may take to finish what it has."""
    attempts: int = 5
    """Replicas that are tried for one request, one after the other, before it ends with an error."""
    actor_options: Mapping[str, Any] = field(default_factory=dict)
    """Ray's options of a replica's actor: num_cpus, num_gpus, resources, runtime_env …"""

    def __post_init__(self) -> None:
        if "backend" in self.engine and self.backends:
            raise ConfigError("engine has a backend and backends names some too: give one of the two.")
        if self.replicas and self.backends and self.replicas % len(self.backends):
            raise ConfigError(
                f"replicas={self.replicas} over backends={', '.join(self.backends)}: give a multiple of "
                f"{len(self.backends)}, so that each backend has its share."
            )
        for name in ("max_ongoing_requests", "prefix_block", "prefix_blocks_kept", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.replicas < 0 or self.imbalance < 0:
            raise ConfigError(f"replicas={self.replicas}, imbalance={self.imbalance}: must not be below 0.")

    @property
    def num_replicas(self) -> int:
        return self.replicas or len(self.backends) or 1

    def engine_options(self, rank: int) -> dict[str, Any]:
        """What the replica of this rank makes its engine from."""
        options = dict(self.engine)
        if self.backends:
            options["backend"] = self.backends[rank % len(self.backends)]
        return options
