"""What an import may load. Module names are asserted, not seconds: those are `dougong bench`'s business."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton", "fastapi", "uvicorn", "starlette", "numpy", "gguf", "safetensors")
#: Modules that another framework embeds alone, or that run before anything is chosen.
LIGHT = (
    "dougong",
    "dougong.errors",
    "dougong.types",
    "dougong.config",
    "dougong.plugins",
    "dougong.kv",
    "dougong.scheduling",
)


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_no_torch(module: str) -> None:
    heavy = loaded_by(f"import {module}").intersection(HEAVY)
    assert not heavy, f"import {module} loads {sorted(heavy)}"


def test_import_dougong_loads_no_plugin() -> None:
    loaded = loaded_by("import dougong")
    assert not {name for name in loaded if name.startswith("dougong_")}


def test_discovering_plugins_loads_no_torch() -> None:
    loaded = loaded_by("import dougong.plugins; dougong.plugins.load_plugins()")
    heavy = loaded.intersection(HEAVY)
    assert not heavy, f"a plugin module imports {sorted(heavy)}; it must name its classes by string"


def test_hal_and_llm_load_no_web_framework_and_no_triton() -> None:
    loaded = loaded_by("import dougong.hal; from dougong import LLM, Engine, AsyncEngine, SamplingParams")
    assert not loaded.intersection({"fastapi", "uvicorn", "starlette", "triton"})


def test_unknown_name_is_an_attribute_error() -> None:
    import dougong

    with pytest.raises(AttributeError, match="no_such_name"):
        dougong.no_such_name  # noqa: B018
