"""Writing a new vendor's package from the template."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

__all__ = ["FILES", "write_package"]

#: Template file -> where it goes; NAME stands for the backend's name.
FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "init.py.in": "dougong_NAME/__init__.py",
    "device.py.in": "dougong_NAME/device.py",
    "attention.py.in": "dougong_NAME/attention.py",
    "compat.toml.in": "dougong_NAME/compat.toml",
    "test_compat.py.in": "tests/test_compat.py",
    "workflow.yml.in": ".github/workflows/compat.yml",
    "gitlab-ci.yml.in": ".gitlab-ci.yml",
}


def write_package(name: str, folder: Path) -> list[Path]:
    """Write the package of backend ``name`` into ``folder``; the files written.

    Raises:
        ValueError: the name is no backend's name, or the folder holds files already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"backend name {name!r}: a lower-case letter, then letters, digits and '_'")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give --out a new folder")
    written = []
    source = resources.files("dougong_compat") / "template" / "files"
    for template, target in FILES.items():
        text = source.joinpath(template).read_text(encoding="utf-8")
        title = "".join(part.title() for part in name.split("_"))
        text = text.replace("@name@", name).replace("@Name@", title).replace("@dist@", name.replace("_", "-"))
        path = folder / target.replace("NAME", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
