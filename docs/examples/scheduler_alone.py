"""dougong's scheduler and KV manager under another framework's loop. No torch, no model: a runner of 40 lines.

The "device" is a dictionary from slots to tokens; the "model" adds up all tokens that a position sees.
"""

from dougong.kv import GroupSpec, KVCacheManager
from dougong.scheduling import Request, Scheduler, SchedulerConfig, StepPlan
from dougong.types import SamplingParams

BLOCK = 4
kv = KVCacheManager([GroupSpec(block_size=BLOCK, num_blocks=16)])
scheduler = Scheduler(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48), kv)
tables: dict[int, list[int]] = {}  # seat -> block table, kept up to date from what plans report
cache: dict[int, int] = {}  # slot -> token, in place of K and V


def run(plan: StepPlan) -> list[int]:
    for seat, _group, first, ids in plan.new_blocks:
        tables.setdefault(seat, [])[first:] = ids
    for _group, source, target in plan.copies:
        cache.update({target * BLOCK + i: cache.get(source * BLOCK + i, 0) for i in range(BLOCK)})
    sampled = []
    for request, start, count in zip(plan.requests, plan.starts, plan.num_tokens):
        slots = [tables[request.batch_index][p // BLOCK] * BLOCK + p % BLOCK for p in range(start + count)]
        for position, token in enumerate(request.token_slice(start, start + count), start):
            cache[slots[position]] = token
        sampled.append(sum(cache[slot] for slot in slots) % 100)
    return sampled


question = [3, 1, 4, 1, 5, 9, 2, 6]
first = Request("a", question, SamplingParams(max_tokens=5))
second = first.sibling("b")
scheduler.add(first)
scheduler.add(second)
while scheduler.has_work:
    plan = scheduler.schedule()
    assert plan is not None
    for request, token, reason in scheduler.commit(plan, run(plan)):
        print(request.request_id, token, reason or "")
assert first.output_token_ids == second.output_token_ids == [31, 62, 24, 48, 96]
assert second.num_cached_tokens == 7  # it shares the prompt's blocks and computes one token of it
