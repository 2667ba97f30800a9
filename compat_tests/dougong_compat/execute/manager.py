"""L2: the block manager against a shadow of the device's memory.

The shadow holds, for every slot of every block, what was last computed into it: the whole prefix up to that position
and all else that its KV depends on. After every step each living sequence must find its own prefix in every block that
it can still see. The core's manager is imported when the first such case runs.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Shadow", "execute"]

_Checks = Iterator[tuple[str, bool]]


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    params = request["params"]
    kv = importlib.import_module("dougong.kv")
    check = globals()[f"_{params['check']}"]
    message["provider"] = "dougong.kv"
    message["checks"] = [[what, bool(held)] for what, held in check(kv, params, request["seed"])]


class Shadow:
    """A manager, its sequences, and what lies in each slot."""

    def __init__(self, kv: Any, groups: list[dict[str, Any]], caching: bool = True) -> None:
        self.kv = kv
        self.specs = [kv.GroupSpec(**group) for group in groups]
        self.manager = kv.KVCacheManager(self.specs, enable_prefix_caching=caching, hash_key=b"suite")
        self.memory: list[dict[int, Any]] = [{} for _ in groups]
        self.computed: dict[int, int] = {}
        self.living: list[Any] = []

    def sequence(self, tokens: list[int], **more: Any) -> Any:
        return self.kv.KVSequence(tokens, **more)

    def content(self, sequence: Any, position: int) -> Any:
        """What the KV of ``position`` depends on."""
        tokens = tuple(sequence.token_slice(0, position + 1))
        images = tuple(span for span in sequence.multimodal if span.position <= position)
        return tokens, sequence.adapter, sequence.cache_salt, images

    def begin(self, sequence: Any, num_tokens: int, hit: Any = None) -> int | None:
        """Admit: match, take blocks, run copies. The hit's length, or None if there was no room."""
        manager = self.manager
        if hit is None:
            hit = manager.match(sequence)
        copies = manager.begin(sequence, hit, max(num_tokens, hit.num_tokens + 1))
        if copies is None:
            return None
        for copy in copies:
            size = self.specs[copy.group].block_size
            for place in range(size):
                source = self.memory[copy.group].get(copy.src * size + place)
                self.memory[copy.group][copy.dst * size + place] = source
        manager.flush_copies()
        self.computed[id(sequence)] = hit.num_tokens
        self.living.append(sequence)
        return int(hit.num_tokens)

    def compute(self, sequence: Any, upto: int, confirm: bool = True) -> bool:
        """Compute positions up to ``upto``: write the shadow, then confirm."""
        if self.manager.grow(sequence, upto) is None:
            return False
        for group, spec in enumerate(self.specs):
            table = sequence.block_ids[group]
            for position in range(self.computed[id(sequence)], upto):
                block = table[position // spec.block_size]
                self.memory[group][block * spec.block_size + position % spec.block_size] = self.content(
                    sequence, position
                )
        self.computed[id(sequence)] = upto
        if confirm:
            self.manager.confirm(sequence, min(upto, sequence.num_tokens))
        return True

    def release(self, sequence: Any) -> None:
        self.manager.release(sequence)
        self.living.remove(sequence)

    def faults(self) -> list[str]:
        """Everything that contradicts the contract now."""
        found = []
        try:
            self.manager.check_integrity(self.living)
        except AssertionError as error:
            found.append(f"check_integrity: {error}")
        for sequence in self.living:
            done = self.computed[id(sequence)]
            for group, spec in enumerate(self.specs):
                table = sequence.block_ids[group]
                first = 0 if spec.window is None else max(0, done - spec.window + 1)
                for position in range(first, done):
                    block = table[position // spec.block_size]
                    if block < spec.num_scratch_blocks:
                        found.append(f"group {group}: position {position} of {done} has no block")
                        break
                    held = self.memory[group].get(block * spec.block_size + position % spec.block_size)
                    if held != self.content(sequence, position):
                        found.append(f"group {group}: block {block} does not hold position {position} of its sequence")
                        break
        return found


def _sound(shadow: Shadow, what: str) -> tuple[str, bool]:
    faults = shadow.faults()
    return (f"{what}: {faults[0]}" if faults else what), not faults


def _random_walk(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """Random admissions, chunks, tokens, forks, preemptions and resets."""
    rng = random.Random(seed)
    shadow = Shadow(kv, params["groups"], params.get("caching", True))
    alphabet = params.get("alphabet", 3)  # few different tokens: many common prefixes
    salts = [None, "a", "b"]
    for step in range(params["steps"]):
        action = rng.random()
        if action < 0.3 or not shadow.living:
            length = rng.randrange(1, params.get("longest", 40))
            images = ((rng.randrange(length), 1, bytes([rng.randrange(2)])),) if rng.random() < 0.2 else ()
            sequence = shadow.sequence(
                [rng.randrange(alphabet) for _ in range(length)],
                cache_salt=rng.choice(salts) if rng.random() < 0.3 else None,
                adapter="lora" if rng.random() < 0.2 else None, multimodal=images,
            )  # fmt: skip
            if shadow.begin(sequence, rng.randrange(1, length + 1)) is not None:
                shadow.compute(sequence, min(length, shadow.computed[id(sequence)] + 1))
        elif action < 0.75:
            sequence = rng.choice(shadow.living)
            done, total = shadow.computed[id(sequence)], sequence.num_tokens
            if done < total:
                shadow.compute(sequence, min(total, done + rng.randrange(1, 9)))
            else:
                sequence.output_token_ids.append(rng.randrange(alphabet))
                if not shadow.compute(sequence, total + 1):
                    sequence.output_token_ids.pop()
        elif action < 0.85:
            source = rng.choice(shadow.living)
            done = shadow.computed[id(source)]
            sequence = shadow.sequence(
                source.token_slice(0, source.num_tokens), adapter=source.adapter, cache_salt=source.cache_salt,
                multimodal=source.multimodal,
            )  # fmt: skip
            hit = shadow.manager.share(source, done) if done > 1 else None
            if hit is not None:
                shadow.begin(sequence, done, hit)
        elif action < 0.98:
            shadow.release(rng.choice(shadow.living))
        else:
            shadow.manager.reset_prefix_cache()
        faults = shadow.faults()
        if faults:
            yield f"step {step}: {faults[0]}", False
            return
    for sequence in list(shadow.living):
        shadow.release(sequence)
    yield _sound(shadow, "books after all are released")
    usable = sum(spec.num_blocks - spec.num_scratch_blocks for spec in shadow.specs)
    yield "every block is free at the end", shadow.manager.num_free_blocks == usable


def _plain(block: int = 4, blocks: int = 32) -> list[dict[str, Any]]:
    return [{"block_size": block, "num_blocks": blocks, "num_scratch_blocks": 2}]


def _held_until_released(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """A block that a running sequence holds is not handed out, however scarce blocks are."""
    shadow = Shadow(kv, _plain(4, 12))
    first = shadow.sequence(list(range(24)))
    yield "admitted", shadow.begin(first, 24) is not None and shadow.compute(first, 24)
    held = set(first.block_ids[0])
    others: list[Any] = []
    while True:
        other = shadow.sequence([900 + len(others)] * 5)
        if shadow.begin(other, 5) is None:
            break
        shadow.compute(other, 5)
        others.append(other)
        yield "no block twice", not held & set(other.block_ids[0])
    yield _sound(shadow, "the pool is full")
    yield "refused without a change", shadow.manager.grow(first, 400) is None
    yield _sound(shadow, "after the refusal")
    for other in others:
        shadow.release(other)
    yield _sound(shadow, "after the others went")


def _insert_then_preempt(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """A chunk enters the index, the sequence is preempted, another hits it, the first resumes."""
    shadow = Shadow(kv, _plain(4, 16))
    tokens = list(range(100, 118))
    first = shadow.sequence(tokens)
    shadow.begin(first, 10)
    shadow.compute(first, 10)
    shadow.release(first)
    second = shadow.sequence([*tokens[:10], 7, 7, 7])
    hit = shadow.begin(second, 13)
    yield "only full, computed blocks are found", hit in (0, 4, 8)
    shadow.compute(second, 13)
    resumed = shadow.begin(first, 18)
    yield "the first resumes from what it computed", resumed is not None and resumed <= 10
    shadow.compute(first, 18)
    yield _sound(shadow, "both run")


def _copy_on_write(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """A fork that ends inside a block gets its own copy of it; the source's stays."""
    for length in (3, 5, 6, 8, 9):
        shadow = Shadow(kv, _plain())
        source = shadow.sequence(list(range(50, 50 + length)))
        shadow.begin(source, length)
        shadow.compute(source, length)
        fork = shadow.sequence(source.token_slice(0, length))
        hit = shadow.manager.share(source, length)
        yield f"{length}: shareable", hit is not None
        shadow.begin(fork, length + 1, hit)
        for sequence, token in ((source, 1), (fork, 2)):
            sequence.output_token_ids.append(token)
            shadow.compute(sequence, length + 1)
        yield _sound(shadow, f"{length}: both wrote their next token")
        whole = length // 4
        yield f"{length}: full blocks are shared", source.block_ids[0][:whole] == fork.block_ids[0][:whole]
        yield f"{length}: the last is not", source.block_ids[0][length // 4] != fork.block_ids[0][length // 4]


def _prefix_key(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """What changes KV changes the key."""
    shadow = Shadow(kv, _plain())
    tokens = list(range(200, 217))
    ways: dict[str, list[dict[str, Any]]] = {
        "adapter": [{}, {"adapter": "a"}, {"adapter": "b"}],
        "salt": [{}, {"cache_salt": "a"}, {"cache_salt": "b"}],
        "image": [
            {},
            {"multimodal": ((1, 2, b"x"),)},
            {"multimodal": ((1, 2, b"y"),)},
            {"multimodal": ((2, 2, b"x"),)},
        ],
        "position": [{}, {"multimodal": ((5, 1, b"x"),)}, {"multimodal": ((6, 1, b"x"),)}],
        "parent": [{}],
    }
    for more in ways[params["what"]]:
        sequence = shadow.sequence(tokens, **more)
        hit = shadow.begin(sequence, len(tokens))
        # blocks wholly before the first image are alike for all
        alike = min([16, *(span[0] for span in more["multimodal"])]) // 4 * 4 if "multimodal" in more else 0
        yield f"{more or 'plain'} finds nothing of the others ({hit})", hit is not None and hit <= alike
        shadow.compute(sequence, len(tokens))
        again = shadow.sequence(tokens, **more)
        yield f"{more or 'plain'} finds its own", shadow.manager.match(again).num_tokens == 16
    shifted = shadow.sequence([1, *tokens])
    yield "the same blocks behind another parent are not the same", shadow.manager.match(shifted).num_tokens == 0
    swapped = shadow.sequence([*tokens[4:8], *tokens[:4], *tokens[8:]])
    yield "blocks in another order are not the same", shadow.manager.match(swapped).num_tokens == 0
    yield _sound(shadow, "books")


def _partial_prefix(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """A hit never covers a token that was not computed, nor the last one."""
    total = params["total"]
    shadow = Shadow(kv, _plain(16, 20))
    tokens = [i % 7 for i in range(total)]
    first = shadow.sequence(tokens)
    shadow.begin(first, total)
    shadow.compute(first, total - 1)
    second = shadow.sequence(tokens)
    hit = shadow.manager.match(second).num_tokens
    yield f"a hit of {hit} of {total}", hit <= (total - 1) // 16 * 16
    shadow.compute(first, total)
    hit = shadow.begin(second, total) or 0
    yield "the last token is computed anew", hit <= total - 1
    shadow.compute(second, total)
    yield _sound(shadow, "both run")


def _hybrid_prefix(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """Full attention, a window and another block size: a hit is valid in every group."""
    groups = [
        {"block_size": 8, "num_blocks": 30}, {"block_size": 4, "num_blocks": 10, "window": 10},
        {"block_size": 8, "num_blocks": 9, "window": 17},
    ]  # fmt: skip
    shadow = Shadow(kv, groups)
    tokens = [i % 5 for i in range(60)]
    first = shadow.sequence(tokens)
    shadow.begin(first, 5)
    for upto in range(5, 61, 5):
        yield f"room for {upto}", shadow.compute(first, upto)
        yield _sound(shadow, f"computed {upto}")
    yield "blocks behind the window went back", first.block_ids[1][0] == 0
    shadow.release(first)
    for length in (60, 48, 33, 25, 9):
        # the windows' pools are small: what lay behind a window was overwritten long ago
        second = shadow.sequence(tokens[:length])
        hit = shadow.begin(second, 1)
        yield f"a prompt of {length} starts", hit is not None
        yield _sound(shadow, f"a prompt of {length} with a hit of {hit}, just begun")
        at = hit or 0
        while at < length:
            at = min(length, at + 5)
            shadow.compute(second, at)
        yield _sound(shadow, f"a prompt of {length} with a hit of {hit}")
        shadow.release(second)


def _resume(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """Release and begin again with the tokens made so far: nothing is counted twice."""
    shadow = Shadow(kv, _plain(4, 24))
    sequence = shadow.sequence(list(range(10)))
    shadow.begin(sequence, 10)
    shadow.compute(sequence, 10)
    for turn in range(5):
        sequence.output_token_ids.append(turn)
        shadow.compute(sequence, 11 + turn)
        shadow.release(sequence)
        yield _sound(shadow, f"released {turn}")
        hit = shadow.begin(sequence, 11 + turn)
        yield f"a hit of {hit} is within what was computed", hit is not None and hit <= 10 + turn
        shadow.compute(sequence, 11 + turn)
        yield _sound(shadow, f"resumed {turn}")
        need = -(-(11 + turn) // 4)
        yield "no more blocks than tokens need", len(sequence.block_ids[0]) == need


def _window(kv: Any, params: dict[str, Any], seed: int) -> _Checks:
    """Blocks behind a window go back in time and not too early, token by token."""
    size, window = params["block"], params["window"]
    shadow = Shadow(kv, [{"block_size": size, "num_blocks": 64 // size + 40, "window": window}])
    sequence = shadow.sequence([1])
    shadow.begin(sequence, 1)
    shadow.compute(sequence, 1)
    for step in range(1, 4 * window + 2 * size):
        sequence.output_token_ids.append(step)
        shadow.compute(sequence, step + 1)
        what, held = _sound(shadow, f"token {step}")
        if not held:
            yield what, held
            return
    held_blocks = sum(1 for block in sequence.block_ids[0] if block)
    yield f"{held_blocks} blocks held", held_blocks <= (window + size - 2) // size + 2
