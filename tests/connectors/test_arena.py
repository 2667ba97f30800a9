"""The ring of blocks in shared memory: what is read is what was written under that name, or nothing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest

from dougong.connectors.arena import ArenaReader, ArenaWriter
from dougong.errors import ConfigError
from dougong.plugins import KVBlockName, KVTransferError

KEY = bytes(32)


def name_of(number: int, group: int = 0) -> KVBlockName:
    return KVBlockName(group, number.to_bytes(16, "little"))


def data_of(number: int, size: int = 100) -> bytes:
    return bytes((number * 7 + at) % 256 for at in range(size))


@pytest.fixture
def where() -> str:
    return f"dougong-t{os.getpid()}"


@pytest.fixture
def writer(where: str) -> Iterator[ArenaWriter]:
    made = ArenaWriter(where, 1 << 16, 8192, 16, KEY, b"{}")
    yield made
    made.close()


def test_a_block_is_read_as_written(writer: ArenaWriter, where: str) -> None:
    reader = ArenaReader(where)
    assert (reader.arena.block_tokens, reader.arena.key, reader.arena.format) == (16, KEY, b"{}")
    writer.put(name_of(1), memoryview(data_of(1)))
    writer.put(name_of(1, group=1), memoryview(data_of(2, 8192)))
    assert name_of(1) not in reader  # not looked yet
    reader.refresh()
    assert reader.get(name_of(1)) == data_of(1) == writer.get(name_of(1))
    assert reader.get(name_of(1, group=1)) == data_of(2, 8192)
    assert reader.get(name_of(2)) is None
    reader.close()


def test_the_oldest_blocks_are_overwritten(writer: ArenaWriter, where: str) -> None:
    slots = writer.arena.slots
    early, late = ArenaReader(where), ArenaReader(where)
    for number in range(slots):
        writer.put(name_of(number), memoryview(data_of(number)))
    early.refresh()
    for number in range(slots, 2 * slots + 2):
        writer.put(name_of(number), memoryview(data_of(number)))
    assert name_of(0) in early and early.get(name_of(0)) is None  # gone since it was seen
    held: list[int] = []
    for reader in (early, late):
        reader.refresh()
        held = [number for number in range(2 * slots + 2) if name_of(number) in reader]
        assert held == list(range(slots + 2, 2 * slots + 2))
        assert [reader.get(name_of(number)) for number in held] == [data_of(number) for number in held]
        reader.close()
    assert [number for number in range(2 * slots + 2) if name_of(number) in writer] == held


def test_a_damaged_block_is_not_given(writer: ArenaWriter, where: str) -> None:
    reader = ArenaReader(where)
    writer.put(name_of(1), memoryview(data_of(1)))
    reader.refresh()
    writer.arena.slot(0, 1)[0] ^= 1
    with pytest.raises(KVTransferError, match="checksum"):
        reader.get(name_of(1))
    writer.arena.slot(0, 1)[0] ^= 1
    writer.arena.put_entry(0, 2, name_of(9), 100, 0)
    with pytest.raises(KVTransferError, match="another name"):
        reader.get(name_of(1))
    writer.arena.put_entry(0, 1, name_of(1), 100, 0)  # being written
    assert reader.get(name_of(1)) is None
    reader.close()


def test_forgotten_blocks_are_not_found(writer: ArenaWriter, where: str) -> None:
    reader = ArenaReader(where)
    writer.put(name_of(1), memoryview(data_of(1)))
    reader.refresh()
    writer.clear()
    assert name_of(1) not in writer and reader.get(name_of(1)) is None
    fresh = ArenaReader(where)
    fresh.refresh()
    assert name_of(1) not in fresh
    writer.put(name_of(1), memoryview(data_of(1)))
    reader.clear()
    reader.refresh()
    assert name_of(1) not in reader
    reader.close()
    fresh.close()


def test_a_second_writer_is_refused(writer: ArenaWriter, where: str) -> None:
    with pytest.raises(ConfigError, match="another process that is running"):
        ArenaWriter(where, 1 << 16, 8192, 16, KEY, b"{}")


def test_too_small_or_too_large(where: str) -> None:
    with pytest.raises(ConfigError, match="holds no block"):
        ArenaWriter(where, 8192, 8192, 16, KEY, b"{}")
    with pytest.raises(ConfigError, match=r"does not fit|cannot be made"):
        ArenaWriter(where, 1 << 50, 8192, 16, KEY, b"{}")
    with pytest.raises(FileNotFoundError):
        ArenaReader(where)


def _write_and_die(where: str, ready: Any) -> None:
    writer = ArenaWriter(where, 1 << 16, 8192, 16, KEY, b"{}")
    writer.put(name_of(1), memoryview(data_of(1)))
    ready.send(True)
    ready.recv()
    os._exit(1)


def test_a_dead_writers_arena_is_replaced(where: str) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_write_and_die, args=(where, there))
    process.start()
    assert here.poll(60)
    reader = ArenaReader(where)
    reader.refresh()
    assert reader.get(name_of(1)) == data_of(1)
    here.send(True)
    process.join()
    writer = ArenaWriter(where, 1 << 16, 8192, 16, KEY, b"{}")
    again = ArenaReader(where)
    assert again.arena.generation != reader.arena.generation
    for one in (reader, again, writer):
        one.close()
