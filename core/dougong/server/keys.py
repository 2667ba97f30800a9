"""API keys: what is on disk are hashes; a key itself is shown once, when it is made."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dougong.errors import ConfigError

__all__ = ["Key", "KeyFile", "KeyRing"]

#: How often the file is looked at for changes, in seconds.
_LOOK_S = 1.0


@dataclass(frozen=True)
class Key:
    """One client's key. ``hash``: SHA-256 in hex. Keys are random and long, so a slow hash would gain nothing."""

    name: str
    hash: str
    created: str
    """UTC, ISO 8601."""
    requests_per_minute: int | None = None
    """In place of the server's ``rate_limit_requests``."""
    tokens_per_minute: int | None = None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The keys in a file of mode 0600. Written whole and moved into place: a reader never sees half of it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[Key]:
        """All keys; none if there is no file.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            content: Any = json.loads(self.path.read_text(encoding="utf-8"))
            return [Key(**entry) for entry in content["keys"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"API key file {self.path}: {type(error).__name__}: {error}") from error

    def add(self, name: str, **limits: int | None) -> str:
        """Make a key and return it: this is the only time that it can be seen.

        Raises:
            ConfigError: there is one of this name, or a limit below 1.
        """
        keys = self.read()
        if not name or any(key.name == name for key in keys):
            raise ConfigError(f"API key {name!r}: give each key a name of its own (`dougong keys list` shows them).")
        for limit, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"{limit}={value}: allowed is an integer >= 1.")
        secret = "sk-dougong-" + secrets.token_urlsafe(32)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write([*keys, replace(Key(name, _hash(secret), created), **limits)])  # type: ignore[arg-type]
        return secret

    def remove(self, name: str) -> None:
        """Raises:
        ConfigError: there is none of this name.
        """
        keys = self.read()
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ConfigError(f"API key {name!r}: not in {self.path} (`dougong keys list` shows what is).")
        self._write(left)

    def _write(self, keys: Iterable[Key]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)


class KeyRing:
    """The keys that a running server accepts: fixed ones, and those of a file, which is read again when it changes."""

    def __init__(self, fixed: Iterable[str] = (), path: str | Path | None = None) -> None:
        self._fixed = {_hash(key): Key(f"option-{i}", _hash(key), "") for i, key in enumerate(fixed)}
        self._file = None if path is None else KeyFile(path)
        self._keys = dict(self._fixed)
        self._stamp: tuple[int, int, int] | None = None
        self._next_look = 0.0
        if self._file is not None:
            self._load(strict=True)

    def find(self, secret: str) -> Key | None:
        """The key that ``secret`` is, or None. Looked up by its hash, so that the time taken tells nothing of it."""
        if self._file is not None and time.monotonic() >= self._next_look:
            self._load(strict=False)
        try:
            return self._keys.get(_hash(secret))
        except UnicodeEncodeError:
            return None

    def _load(self, strict: bool) -> None:
        assert self._file is not None
        self._next_look = time.monotonic() + _LOOK_S
        try:
            status = self._file.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError as error:
            if strict:
                raise ConfigError(
                    f"api_keys_file={str(self._file.path)!r} cannot be read ({error.strerror}). Make the first key "
                    f"with `dougong keys add NAME --file {self._file.path}`."
                ) from error
            self._keys, self._stamp = dict(self._fixed), None  # a file that was removed lets nobody in
            return
        if stamp != self._stamp:
            try:
                self._keys = self._fixed | {key.hash: key for key in self._file.read()}
                self._stamp = stamp
            except ConfigError:
                if strict:
                    raise
