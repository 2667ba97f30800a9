"""What Python's reader of JSON lets through and JSON does not have: refused before a route works with it.

Half a character (a lone surrogate), NaN and numbers beyond a float's range can be read, but not written again: an
answer that repeats a field, or the message to the engine, would fail on them.
"""

from __future__ import annotations

import json
import re

from fastapi import Request

from dougong.errors import InvalidRequestError

__all__ = ["check_json"]

#: Bytes without which a body has none of it; those of a body in UTF-16 are looked at in any case.
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|NaN|Infinity|[0-9][eE]\+?[0-9]{3}|[0-9]{200}|\x00")


async def check_json(request: Request) -> None:
    """A dependency of every route.

    Raises:
        InvalidRequestError: the body is not what JSON can be, or is nested too deeply.
    """
    if request.method != "POST" or _SUSPECT.search(await request.body()) is None:
        return
    try:
        json.dumps(await request.json(), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise InvalidRequestError(
            f"the body is not valid Unicode: it holds a lone surrogate, U+{half:04X}. Send whole characters."
        ) from None
    except ValueError:
        raise InvalidRequestError(
            "the body holds NaN, Infinity or a number too large for a float of 64 bits: JSON has no such numbers."
        ) from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply. Make it flatter.") from None
