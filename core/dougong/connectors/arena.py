"""A ring of blocks in shared memory: one process writes, any number read, nobody waits.

    header   magic, generation, blocks written so far, slots, tokens per block, bytes per slot, key, format
    index    one entry per slot: sequence number, group, size, CRC-32, digest
    data     the slots

Block n goes into slot n mod slots. Its entry's sequence number is 2n+1 while it is written and 2n+2 once it lies there,
so a reader sees whether the slot still holds what it looked for; the checksum covers name and data, so a block that was
overwritten while it was being copied, or by a writer gone mad, is not taken for another.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from struct import Struct
from typing import Any

from dougong.errors import ConfigError
from dougong.plugins import KVBlockName, KVTransferError

__all__ = ["Arena", "ArenaReader", "ArenaWriter"]

_MAGIC = b"dougkv01"
_HEADER = Struct("<8sQQIIQII32s")
_COUNT = Struct("<Q")
_COUNT_AT = 16
_CLOSED = Struct("<I")
_CLOSED_AT = 40
_ENTRY = Struct("<QIIII16s")
_PAGE = 4096
_track = threading.Lock()


@contextmanager
def _untracked() -> Iterator[None]:
    """multiprocessing's tracker removes memory when a process ends that has attached to it, although it is another's.
    Python 3.13 has an option against that; before, the tracker is not told."""
    if sys.version_info >= (3, 13):
        yield
        return
    with _track:
        register, unregister = resource_tracker.register, resource_tracker.unregister
        resource_tracker.register = resource_tracker.unregister = lambda name, rtype: None
        try:
            yield
        finally:
            resource_tracker.register, resource_tracker.unregister = register, unregister


def _attach(name: str) -> SharedMemory:
    """Memory that another process made.

    Raises:
        FileNotFoundError: there is none of that name.
        KVTransferError: it is being made just now, and has no size yet.
    """
    try:
        if sys.version_info >= (3, 13):
            return SharedMemory(name, track=False)
        with _untracked():
            return SharedMemory(name)
    except ValueError as error:
        raise KVTransferError(f"shared memory {name!r} is not ready yet") from error


class Arena:
    """The memory and its header. ``format`` is the writer's, as JSON bytes."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.buffer = _buffer(memory)
        fields: Any = _HEADER.unpack_from(self.buffer, 0)
        magic, self.generation, _, self.slots, self.block_tokens, self.slot_bytes, _, length, self.key = fields
        if magic != _MAGIC:
            self.buffer = memoryview(b"")
            memory.close()
            raise KVTransferError(f"shared memory {memory.name!r} is no KV arena of this version, or not ready yet")
        self.format = bytes(self.buffer[_HEADER.size : _HEADER.size + length])
        self._index = _pages(_HEADER.size + length)
        self._data = self._index + _pages(self.slots * _ENTRY.size)

    @property
    def written(self) -> int:
        """Blocks written since the arena was made."""
        return int(_COUNT.unpack_from(self.buffer, _COUNT_AT)[0])

    @property
    def closed(self) -> bool:
        """The writer has gone in peace."""
        return bool(_CLOSED.unpack_from(self.buffer, _CLOSED_AT)[0])

    def entry(self, number: int) -> tuple[int, int, int, int, bytes]:
        """(sequence, group, size, checksum, digest) of the slot that block ``number`` has or had."""
        sequence, group, size, checksum, _, digest = _ENTRY.unpack_from(
            self.buffer, self._index + number % self.slots * _ENTRY.size
        )
        return sequence, group, size, checksum, digest

    def put_entry(self, number: int, sequence: int, name: KVBlockName, size: int, checksum: int) -> None:
        at = self._index + number % self.slots * _ENTRY.size
        _ENTRY.pack_into(self.buffer, at, sequence, name.group, size, checksum, 0, name.digest)

    def slot(self, number: int, size: int) -> memoryview:
        at = self._data + number % self.slots * self.slot_bytes
        return self.buffer[at : at + size]

    def get(self, number: int, name: KVBlockName) -> bytes | None:
        """A copy of block ``number``, which is ``name``; None if it was overwritten.

        Raises:
            KVTransferError: it is there, and its name or its checksum is wrong.
        """
        sequence, group, size, checksum, digest = self.entry(number)
        if sequence != 2 * number + 2:
            return None
        if (group, digest) != name or size > self.slot_bytes:
            raise KVTransferError(f"block {number} of the arena has another name than its index said")
        data = bytes(self.slot(number, size))
        if self.entry(number)[0] != sequence:
            return None
        if _checksum(name, data) != checksum:
            raise KVTransferError(f"block {number} of the arena has a wrong checksum")
        return data

    def release(self) -> None:
        """Let go of the mapping."""
        self.buffer = memoryview(b"")
        self.memory.close()


class ArenaWriter:
    """Makes the arena; the only one to write it. Removes it when closed, and when the process dies.

    Raises:
        ConfigError: another living process has an arena of that name, or there is too little shared memory.
    """

    def __init__(self, name: str, size: int, slot_bytes: int, block_tokens: int, key: bytes, format_: bytes) -> None:
        head = _pages(_HEADER.size + len(format_))
        slots = (size - head - _PAGE) // (slot_bytes + _ENTRY.size)
        if slots < 1:
            raise ConfigError(
                f"a KV arena of {size >> 20} MiB holds no block: one takes {slot_bytes / 2**20:.1f} MiB. "
                'Raise kv_connector_options={"size_mib": …}.'
            )
        total = head + _pages(slots * _ENTRY.size) + slots * slot_bytes
        memory = _create(name, total)
        buffer = _buffer(memory)
        buffer[_HEADER.size : _HEADER.size + len(format_)] = format_
        fields = (secrets.randbits(63), 0, slots, block_tokens, slot_bytes, 0, len(format_), key)
        _HEADER.pack_into(buffer, 0, bytes(8), *fields)
        buffer[: len(_MAGIC)] = _MAGIC  # last: a reader that comes earlier sees none
        self.arena = Arena(memory)
        self._where: dict[KVBlockName, int] = {}
        self._held: list[KVBlockName | None] = [None] * slots

    def __contains__(self, name: KVBlockName) -> bool:
        return name in self._where

    def put(self, name: KVBlockName, block: memoryview) -> None:
        """Store a block over the oldest one."""
        arena, number = self.arena, self.arena.written
        place = number % arena.slots
        old = self._held[place]
        if old is not None:
            del self._where[old]
        data, size = block.cast("B"), block.nbytes
        arena.put_entry(number, 2 * number + 1, name, size, 0)
        arena.slot(number, size)[:] = data
        arena.put_entry(number, 2 * number + 2, name, size, _checksum(name, data))
        self._held[place] = name
        self._where[name] = number
        _COUNT.pack_into(arena.buffer, _COUNT_AT, number + 1)

    def get(self, name: KVBlockName) -> bytes | None:
        """As `Arena.get`; None too if it is not there."""
        number = self._where.get(name)
        return None if number is None else self.arena.get(number, name)

    def clear(self) -> None:
        """Forget all blocks: their entries no longer say that they lie there."""
        for name, number in self._where.items():
            self.arena.put_entry(number, 2 * number + 1, name, 0, 0)
        self._where.clear()
        self._held = [None] * self.arena.slots

    def close(self) -> None:
        """Tell readers, and remove the name; those that have it mapped keep it."""
        _CLOSED.pack_into(self.arena.buffer, _CLOSED_AT, 1)
        self.arena.release()
        self.arena.memory.unlink()


class ArenaReader:
    """Reads another process's arena; knows which blocks it holds without asking anyone.

    Raises:
        FileNotFoundError: there is none of that name.
        KVTransferError: it is no arena, or not ready.
    """

    def __init__(self, name: str) -> None:
        self.arena = Arena(_attach(name))
        self._where: dict[KVBlockName, int] = {}
        self._names: dict[int, KVBlockName] = {}
        self._seen = 0

    def refresh(self) -> None:
        """Take note of what was written since."""
        arena, written = self.arena, self.arena.written
        for number in range(max(self._seen, written - arena.slots), written):
            sequence, group, _, _, digest = arena.entry(number)
            old = self._names.pop(number % arena.slots, None)
            if old is not None and self._where.get(old, -1) < number:
                self._where.pop(old, None)
            if sequence == 2 * number + 2:
                name = KVBlockName(group, digest)
                self._where[name] = number
                self._names[number % arena.slots] = name
        self._seen = written

    def __contains__(self, name: KVBlockName) -> bool:
        return name in self._where

    def get(self, name: KVBlockName) -> bytes | None:
        """As `Arena.get`; None too if it was never seen."""
        number = self._where.get(name)
        return None if number is None else self.arena.get(number, name)

    def clear(self) -> None:
        """Forget all blocks that were written up to now."""
        self._where.clear()
        self._names.clear()
        self._seen = self.arena.written

    def close(self) -> None:
        self.arena.release()


def _buffer(memory: SharedMemory) -> memoryview:
    buffer = memory.buf
    assert buffer is not None, "mapped, and not closed"
    return buffer


def _checksum(name: KVBlockName, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(name.digest, name.group))


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _create(name: str, size: int) -> SharedMemory:
    for _ in range(2):
        try:
            memory = SharedMemory(name, create=True, size=size)
            break
        except FileExistsError:
            _remove_dead(name)
        except OSError as error:
            raise ConfigError(f"shared memory {name!r} of {size >> 20} MiB cannot be made: {error}.") from error
    else:
        raise ConfigError(f"shared memory {name!r} cannot be made: another process makes it again and again.")
    try:
        # The size alone promises nothing: without this, writing past what the machine has would kill the process.
        os.posix_fallocate(memory._fd, 0, size)  # type: ignore[attr-defined]
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError):
            memory.close()
            memory.unlink()
            raise ConfigError(
                f"a KV arena of {size >> 20} MiB does not fit into this machine's shared memory: {error}. Lower "
                'kv_connector_options={"size_mib": …}, or give more (Docker: --shm-size).'
            ) from error
    _lock(memory)
    return memory


def _lock(memory: SharedMemory) -> bool:
    """Mark the memory as a living process's; the mark goes when the process does. False: somebody else's mark."""
    try:
        import fcntl

        fcntl.flock(memory._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except BlockingIOError:
        return False
    except (ImportError, AttributeError, OSError):  # not on this system: nobody is thought to be dead
        return True
    return True


def _remove_dead(name: str) -> None:
    """Remove an arena that its writer left behind.

    Raises:
        ConfigError: the writer lives.
    """
    try:
        memory = _attach(name)
    except (FileNotFoundError, KVTransferError):
        return
    try:
        if not _lock(memory):
            raise ConfigError(
                f"a KV arena of the name {name!r} belongs to another process that is running: give each producer a "
                'name of its own (kv_connector_options={"name": "…"}).'
            )
        with _untracked():
            memory.unlink()
    finally:
        memory.close()
