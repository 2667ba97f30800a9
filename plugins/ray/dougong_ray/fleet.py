"""Deploying a fleet on Ray Serve, and changing one that runs."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from dougong_ray.config import FleetConfig
from dougong_ray.replica import EngineReplica
from dougong_ray.versions import check_version

__all__ = ["DEPLOYMENT", "start_fleet"]

DEPLOYMENT = "engine"


def start_fleet(config: FleetConfig, *, wait: bool = True) -> Any:
    """Deploy ``config`` and return the deployment's handle. Ray must have been initialised.

    Called again with another config, it is a rolling update: Serve starts new replicas before it stops old ones, and
    an old one has ``drain_s`` seconds to finish what it has. What is not over by then goes on on a new one.
    Another Ray than those that were tried brings a warning that names them.
    """
    check_version()
    deployment = serve.deployment(EngineReplica).options(
        name=DEPLOYMENT,
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        health_check_period_s=config.health_check_period_s,
        health_check_timeout_s=config.health_check_timeout_s,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=config.drain_s,
        ray_actor_options=dict(config.actor_options),
        request_router_config=RequestRouterConfig(
            request_router_class="dougong_ray.router.PrefixRouter",
            request_router_kwargs={
                "prefix_block": config.prefix_block,
                "prefix_blocks_kept": config.prefix_blocks_kept,
                "imbalance": config.imbalance,
            },
        ),
    )
    application = deployment.bind(config)
    if wait:
        return serve.run(application, name=config.name, route_prefix=None)
    serve._run(application, name=config.name, route_prefix=None, _blocking=False)
    return serve.get_deployment_handle(DEPLOYMENT, config.name)
