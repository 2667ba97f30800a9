"""The worker process: opens a backend, answers cases one by one. Knows no oracle.

Started by ``pool`` as ``python -m dougong_compat.worker FD``; frames go over that socket, so that what a backend
prints cannot be taken for an answer.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from dougong.errors import DougongError
from dougong_compat import integrity
from dougong_compat.wire import Closed, receive, send

__all__ = ["answer", "main"]

#: Where the suite itself refuses and skips.
_ASKING = tuple(str(Path(__file__).parent / folder) for folder in ("execute", "harness"))


def answer(context: Any, request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Execute one case; every exception becomes part of the answer."""
    from dougong_compat.execute import kinds
    from dougong_compat.execute.context import Refused
    from dougong_compat.harness.cachemaker import CannotAllocate

    started = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    message: dict[str, Any] = {"id": request["id"], "findings": []}
    try:
        execute = kinds.find(request["kind"])
        execute(context, request, message, tensors)
    except Exception as error:
        if isinstance(error, Refused) and _ours(error):
            message["refused"] = str(error)[:600]
        elif isinstance(error, CannotAllocate) and _ours(error):
            message["skipped"] = str(error)[:300]
        else:
            message["error"] = f"{type(error).__name__}: {error}"[:800]
            message["error_type"] = type(error).__name__
            message["trace"] = traceback.format_exc()[-3000:]
            tensors = {}
            if not _answers(context):
                message["last"] = True
    if request.get("heavy") and "last" not in message:
        _give_back(context)
    message["seconds"] = time.perf_counter() - started
    return message, tensors


def _ours(error: BaseException) -> bool:
    """Whether the suite raised it. A kernel that raises the suite's own refusals and skips has failed."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_code.co_filename.startswith(_ASKING)


def _answers(context: Any) -> bool:
    """Whether the device still works after an error. A GPU's process that read a wild address can do nothing more."""
    try:
        context.device.synchronize()
    except Exception:
        return False
    return True


def _give_back(context: Any) -> None:
    """Return the gigabytes that torch's allocator keeps: other workers share the device."""
    gc.collect()
    empty = getattr(context.device.module, "empty_cache", None) if context.device.type != "cpu" else None
    if empty is not None:
        empty()


def main(fd: int) -> None:
    """Serve requests until the parent closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user's interrupt is the parent's to answer
    torch.set_num_threads(int(os.environ.get("DOUGONG_COMPAT_THREADS", "1")))
    parent = socket.socket(fileno=fd)
    contexts: dict[str, Any] = {}
    context: Any = None
    while True:
        try:
            request, _ = receive(parent)
        except Closed:
            return
        if request["do"] == "stop":
            return
        if request["do"] == "open":
            try:
                key = f"{request['backend']}|{request['plugins']}|{request['mutant']}"
                if key not in contexts:
                    from dougong_compat.execute.context import open_context

                    contexts.clear()
                    plants = sys.modules.get("dougong_compat.selftest.plant")
                    if plants is not None:
                        plants.uproot()
                    contexts[key] = open_context(request["backend"], request["plugins"], request["mutant"])
                context = contexts[key]
                send(parent, {"facts": context.facts()})
            except Exception as error:
                own = isinstance(error, DougongError)
                send(parent, {"open_error": f"{error}" if own else f"{type(error).__name__}: {error}"})
            continue
        for left, case in zip(reversed(range(len(request["cases"]))), request["cases"], strict=True):
            message, tensors = answer(context, case)
            if not left or "last" in message:
                message["changed"] = integrity.changes()
            send(parent, message, tensors)
            if "last" in message:
                os._exit(0)  # a lost device may not even let the process end


if __name__ == "__main__":
    main(int(sys.argv[1]))
