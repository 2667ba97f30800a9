"""Which request computes which tokens in which step. Pure Python: imports no torch and no numpy.

`Scheduler.schedule()` gives a `StepPlan`, the caller computes it, `Scheduler.commit()` takes the sampled
tokens back. It can be embedded alone: the handbook page is docs/scheduling.md, with a runner of 40 lines.
"""

from dougong.scheduling.config import SchedulerConfig
from dougong.scheduling.plan import BlockUpdate, StepPlan, TokenEvent
from dougong.scheduling.policy import POLICIES, Policy, first_come_first_served, priority_with_aging
from dougong.scheduling.request import Request, RequestStatus
from dougong.scheduling.scheduler import Scheduler
from dougong.scheduling.stats import SchedulerStats

__all__ = [
    "POLICIES",
    "BlockUpdate",
    "Policy",
    "Request",
    "RequestStatus",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StepPlan",
    "TokenEvent",
    "first_come_first_served",
    "priority_with_aging",
]
