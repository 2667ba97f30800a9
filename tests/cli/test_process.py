"""What needs a process of its own: the module, imports, pipes that close, and a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_harness import BACKEND

ENVIRONMENT = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False
    )


@pytest.mark.parametrize("code", ["import dougong", "import dougong.cli, sys; sys.argv = ['dougong', '--version']"])
def test_neither_torch_nor_transformers_is_loaded_by_an_import(code: str) -> None:
    tail = "; import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    ended = python("-c", code + tail)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_python_m_dougong() -> None:
    import dougong

    ended = python("-m", "dougong", "--version")
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, dougong.__version__, "")


def test_a_reader_that_goes_away_is_no_error(llama: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dougong", *arguments("generate", llama), "hello", "-n", "100", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    process.wait(120)
    assert b"Traceback" not in complaint and b"Exception ignored" not in complaint


def arguments(command: str, llama: Path) -> list[str]:
    return [command, "--model", str(llama), "--backend", BACKEND, "--dtype", "float32", "--max-model-len", "128"]


class Terminal:
    """A person at a terminal."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT)
        os.close(slave)
        self.seen = ""

    def wait(self, what: Callable[[str], bool], seconds: float = 200) -> str:
        """Read until what was shown since the last line typed answers ``what``."""
        deadline = time.monotonic() + seconds
        while not what(self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    break
        return self.seen

    def type(self, line: str) -> str:
        """A line; gives back what is shown until the next prompt."""
        self.seen = ""
        os.write(self.master, line.encode() + b"\n")
        return self.wait(lambda seen: seen.endswith("> "))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_chat_in_a_terminal(llama: Path) -> None:
    command = [sys.executable, "-m", "dougong", *arguments("chat", llama), "-n", "6", "--system", "Hi."]
    terminal = Terminal(command)
    try:
        assert "/quit" in terminal.wait(lambda seen: seen.endswith("> "))
        first = terminal.type("one")
        assert "36 prompt + " in first  # [system] Hi.\n [user] one\n [assistant] and a space
        longer = terminal.type("two")
        assert "prompt + " in longer and "36 prompt" not in longer
        assert "/undo" in terminal.type("/what")
        terminal.type("/new")
        assert "36 prompt + " in terminal.type("one")  # the same as at first: nothing is left of before
        terminal.type("/undo")
        assert "36 prompt + " in terminal.type("two")
        terminal.type("/undo")
        assert "starts over" in terminal.type("x" * 200)  # longer than the context; the talk goes on
        assert "36 prompt + " in terminal.type("two")
        terminal.type("")
        os.write(terminal.master, b"/quit\n")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


@pytest.mark.prove  # the terminal above ends by a command; this differs by the end of its input alone
def test_chat_ends_with_its_input(llama: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "dougong", *arguments("chat", llama), "-n", "3"],
        input="hello\n", capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert ended.returncode == 0 and "prompt + " in ended.stderr
