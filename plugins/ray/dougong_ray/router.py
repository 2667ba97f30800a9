"""Prefix-aware routing, on Ray Serve's interface for request routers."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from dougong_ray.prefixes import PrefixIndex, choose

__all__ = ["PrefixRouter"]


class PrefixRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Sends a prompt to the replica that has computed the longest prefix of it, as long as that one is not crowded."""

    def initialize_state(
        self, prefix_block: int = 16, prefix_blocks_kept: int = 1 << 18, imbalance: int = 8, **others: Any
    ) -> None:
        """Ray calls this once, with ``request_router_kwargs``."""
        self._prefixes: PrefixIndex[ReplicaID] = PrefixIndex(prefix_block, prefix_blocks_kept)
        self._imbalance = imbalance

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas with room, one rank each, best first."""
        free = {replica.replica_id: replica for replica in self.select_available_replicas(candidate_replicas)}
        loads = {replica: self.replica_queue_len_cache.get(replica) or 0 for replica in free}
        names = self._names(pending_request)
        order = choose(self._prefixes.matched(names, free), loads, self._imbalance)
        return [[free[replica]] for replica in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        names = self._names(pending_request)
        if names:
            self._prefixes.record(names, replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._prefixes.forget(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = set(self.curr_replicas)
        super().update_replicas(replicas)
        for gone in before - set(self.curr_replicas):
            self._prefixes.forget(gone)

    def _names(self, pending: PendingRequest | None) -> list[bytes]:
        """The prompt's block names; a request is routed in one or more tries, and hashed in the first."""
        if pending is None or not pending.args or not isinstance(pending.args[0], dict):
            return []
        job: dict[str, Any] = pending.args[0]
        found: list[bytes] | None = getattr(pending, "_dougong_names", None)
        if found is None:
            found = self._prefixes.names(job.get("prompt_token_ids", ()), job.get("cache_salt"))
            pending._dougong_names = found
        return found
