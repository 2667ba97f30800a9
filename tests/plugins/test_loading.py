"""Plugins: found, filtered before import, loaded one by one, and refused by name with the cause."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from dougong.errors import ConfigError, PluginAbiError, PluginAnswerError, PluginLoadError
from dougong.plugins import ABI, BackendSpec, KernelSpec, PluginFilter, hookimpl, load_plugins
from dougong.plugins.loading import check_abi


@pytest.fixture
def make() -> Iterator[Any]:
    """make(name, **functions) -> an entry point whose module has these hook implementations."""
    made: list[str] = []

    def build(name: str, error: Exception | None = None, **functions: Any) -> EntryPoint:
        module_name = f"dougong_test_plugin_{name}"
        if error is None:
            module = types.ModuleType(module_name)
            for attribute, value in functions.items():
                setattr(module, attribute, value)
            sys.modules[module_name] = module
            made.append(module_name)
        else:
            finder = _Raising(module_name, error)
            sys.meta_path.insert(0, finder)
            made.append(module_name)
            build.finders.append(finder)  # type: ignore[attr-defined]
        return EntryPoint(name, module_name, "dougong")

    build.finders = []  # type: ignore[attr-defined]
    yield build
    for name in made:
        sys.modules.pop(name, None)
    for finder in build.finders:  # type: ignore[attr-defined]
        sys.meta_path.remove(finder)


class _Raising:
    """A module that raises when it is imported."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.error = name, error
        self.asked = 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.name:
            self.asked += 1
            raise self.error


def backends(name: str = "acme", **more: Any) -> Any:
    record = {"name": name, "abi": ABI, "target": "acme.device:Device", **more}

    @hookimpl
    def dougong_backends() -> list[BackendSpec]:
        return [BackendSpec(**record)]

    return dougong_backends


def test_records_come_with_their_plugins_name(make: Any) -> None:
    plugins = load_plugins("", entries=[make("acme", dougong_backends=backends())])
    assert [(name, spec.name) for name, spec in plugins.records("dougong_backends")] == [("acme", "acme")]


def test_a_plugin_that_fails_to_import_stops_the_start_by_name_and_hides_no_other(make: Any) -> None:
    broken = make("broken", error=ImportError("libacme.so: cannot open shared object file"))
    entries = [broken, make("good", dougong_backends=backends())]
    with pytest.raises(PluginLoadError) as error:
        load_plugins("", entries=entries)
    for part in ("'broken'", "libacme.so", "DOUGONG_PLUGINS=-broken"):
        assert part in str(error.value)
    plugins = load_plugins("", entries=entries, strict=False)
    assert [spec.name for _, spec in plugins.records("dougong_backends")] == ["acme"]
    assert [plugin.error is None for plugin in plugins.loaded] == [False, True]


def test_an_excluded_plugin_is_not_even_imported(make: Any) -> None:
    broken = make("broken", error=ImportError("never seen"))
    plugins = load_plugins("-broken", entries=[broken, make("good")])
    assert make.finders[0].asked == 0
    assert [(plugin.name, plugin.skipped) for plugin in plugins.loaded] == [("broken", True), ("good", False)]


def test_pinned_plugins_are_all_that_is_loaded(make: Any) -> None:
    entries = [make("a"), make("b"), make("c")]
    plugins = load_plugins("a,c", entries=entries)
    assert [plugin.name for plugin in plugins.loaded if not plugin.skipped] == ["a", "c"]
    with pytest.raises(ConfigError, match="not installed"):
        load_plugins("nope", entries=entries)


def test_the_environment_is_read(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUGONG_PLUGINS", "-a")
    assert [plugin.skipped for plugin in load_plugins(entries=[make("a"), make("b")]).loaded] == [True, False]


@pytest.mark.parametrize("text", ["a,-b", "-", "-,a"])
def test_a_filter_that_pins_and_excludes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not both"):
        PluginFilter.parse(text)


def test_an_unknown_hook_is_an_error_not_silence(make: Any) -> None:
    @hookimpl
    def dougong_backend() -> list[BackendSpec]:  # singular: a slip
        return []

    with pytest.raises(PluginLoadError, match="dougong_backend"):
        load_plugins("", entries=[make("slip", dougong_backend=dougong_backend)])


@pytest.mark.parametrize(
    ("abi", "advice"), [((ABI[0] + 1, 0), "Upgrade dougong"), ((ABI[0], ABI[1] + 1), "Upgrade dougong")]
)
def test_another_contract_is_refused_with_both_versions(make: Any, abi: tuple[int, int], advice: str) -> None:
    plugins = load_plugins("", entries=[make("future", dougong_backends=backends(abi=abi))])
    with pytest.raises(PluginAbiError) as error:
        plugins.records("dougong_backends")
    for part in ("'future'", f"{abi[0]}.{abi[1]}", f"{ABI[0]}.{ABI[1]}", advice):
        assert part in str(error.value)


def test_an_older_minor_of_the_same_major_is_served() -> None:
    check_abi((1, 0), "old", "1.0", spoken=(1, 4))
    with pytest.raises(PluginAbiError, match="Upgrade the plugin"):
        check_abi((1, 0), "old", "1.0", spoken=(2, 0))


@pytest.mark.parametrize("answer", ["cpu", [{"name": "cpu"}], 5])
def test_an_answer_of_a_wrong_type_is_refused(make: Any, answer: Any) -> None:
    @hookimpl
    def dougong_backends() -> Any:
        return answer

    plugins = load_plugins("", entries=[make("odd", dougong_backends=dougong_backends)])
    with pytest.raises(PluginAnswerError, match="'odd'"):
        plugins.records("dougong_backends")


def test_a_hook_that_raises_is_reported_by_name(make: Any) -> None:
    @hookimpl
    def dougong_kernels(device: Any) -> Any:
        raise ZeroDivisionError("oops")

    plugins = load_plugins("", entries=[make("odd", dougong_kernels=dougong_kernels)])
    with pytest.raises(PluginAnswerError, match=r"'odd' .*ZeroDivisionError: oops"):
        plugins.records("dougong_kernels", device=None)


@pytest.mark.parametrize(
    "wrong", [{"target": "no colon"}, {"abi": 1}, {"abi": (1,)}, {"graph": "sometimes"}], ids=lambda w: next(iter(w))
)
def test_records_check_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="KernelSpec"):
        KernelSpec(**{"op": "silu_mul", "provider": "x", "abi": ABI, "target": "a.b:c", **wrong})


def test_plugins_are_import_light() -> None:
    import subprocess

    code = "import sys, dougong.plugins as p; p.load_plugins(strict=False); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
