"""The handbook's table of the server's options is the code's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("server_options", ROOT / "scripts" / "server_options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "server-options.md").read_text(encoding="utf-8")
    assert written == module.render(), "run `python scripts/server_options.py --write`"
    assert all(line.split("|")[-2].strip() for line in written.splitlines() if line.startswith("| `")), (
        "an option says nothing"
    )
