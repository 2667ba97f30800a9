"""The plugin's side of the contract: what it offers, when it refuses, and life without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dougong_cpu
from dougong.errors import ConfigError
from dougong.hal import NZ16, AttentionQuery, AttentionSpec, LinearQuery, open_backend
from dougong.plugins import load_plugins
from dougong_cpu import build, library
from dougong_cpu.attention import CpuAttention
from dougong_cpu.device import CpuDevice
from dougong_cpu.linear import CpuLinear


def backend() -> object:
    return open_backend("cpu", plugins=load_plugins(entries=[], extra=[("cpu", dougong_cpu)]))


def query(**more: object) -> AttentionQuery:
    spec = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32, **more}
    return AttentionQuery(spec=AttentionSpec(**spec), layout=CpuAttention.layouts[0], block_size=16)  # type: ignore[arg-type]


def test_every_op_runs_on_the_native_kernels() -> None:
    opened = backend()
    table = opened.op_table(torch.bfloat16)  # type: ignore[attr-defined]
    native = {op for op, choice in table.choices.items() if choice.candidate.spec.provider == "cpu-native"}
    assert native == {"rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul", "rope", "qk_norm_rope_write", "argmax"}
    assert opened.choose_attention(query()).target is CpuAttention  # type: ignore[attr-defined]
    asked = LinearQuery(in_features=64, out_features=64, dtype=torch.float32, format="int4")
    assert opened.choose_linear(asked).target is CpuLinear  # type: ignore[attr-defined]
    assert [layout.name for layout in opened.layouts()] == ["nhd", "hnd"]  # type: ignore[attr-defined]


def test_refusals_name_what_is_allowed() -> None:
    device = CpuDevice()
    tiled = AttentionQuery(spec=query().spec, layout=NZ16, block_size=128)
    assert "tiled" in str(CpuAttention.supports(tiled, device)[0])
    assert CpuAttention.supports(query(kv_dtype=torch.float8_e5m2), device)
    assert CpuAttention.supports(query(dtype=torch.float64), device)
    assert not CpuAttention.supports(query(window=4, softcap=1.0, sinks=True), device)
    odd = LinearQuery(in_features=100, out_features=8, dtype=torch.float32, format="int4", group_size=20)
    assert "group" in str(CpuLinear.supports(odd, device)[0])
    assert CpuLinear.supports(LinearQuery(in_features=8, out_features=8, dtype=torch.float32, format="fp4"), device)


def test_a_layer_that_lacks_its_sinks_is_an_error() -> None:
    from oracle import Case, run

    case = Case(AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, dtype=torch.float32, sinks=True), [(1, 3)])
    case.layer = type(case.layer)()
    with pytest.raises(ValueError, match="sinks"):
        run(case)


def test_without_the_library_the_reason_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import dougong_cpu, torch\n"
        "from dougong.hal import open_backend\n"
        "from dougong.plugins import load_plugins\n"
        "b = open_backend('cpu', plugins=load_plugins(entries=[], extra=[('cpu', dougong_cpu)]))\n"
        "choice = b.op_table(torch.float32).choices['silu_mul']\n"
        "print(choice.candidate.spec.provider, '|', choice.refused[0][1])\n"
        "print(b.device.facts()['native library'])\n"
    )
    environment = {**os.environ, "DOUGONG_CPU_LIBRARY": str(tmp_path / "missing.so")}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("torch reference | native library not built")
    assert "install g++" in out.splitlines()[1]


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="this machine runs"):
        library.load().select("avx1024")
    library.load().select(None)


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from dougong_cpu.library import load; print(load().isa)"
    environment = {**os.environ, library.ENV_ISA: "base"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "base"


def test_the_plugin_imports_without_torch() -> None:
    code = "import sys, dougong_cpu; list(dougong_cpu.dougong_backends()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_compiler_is_found_on_an_empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() is None
    assert build.main() == 1


def test_the_host_is_one_device() -> None:
    with pytest.raises(ConfigError, match="device_index=1: the host is one device"):
        open_backend("cpu", index=1, plugins=load_plugins(entries=[], extra=[("cpu", dougong_cpu)]))


def test_memory_is_that_of_the_machine() -> None:
    memory = CpuDevice().memory()
    assert 0 < memory.free <= memory.total


def test_kernels_survive_a_fork() -> None:
    """A child process has none of the pool's threads and must start its own."""
    code = (
        "import os, torch\n"
        "from dougong.hal import LinearQuery\n"
        "from dougong_cpu import threads\n"
        "from dougong_cpu.linear import CpuLinear\n"
        "from dougong_cpu.device import CpuDevice\n"
        "q = LinearQuery(in_features=64, out_features=256, dtype=torch.float32, format='int8')\n"
        "l = CpuLinear(q, CpuDevice())\n"
        "p = l.prepare(torch.ones(256, 64)); threads.count = 3; x = torch.ones(2, 64)\n"
        "want = l.apply(x, p)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if torch.equal(l.apply(x, p), want) else 1)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False).returncode == 0


def test_a_closed_engines_cache_is_let_go() -> None:
    import gc
    import weakref

    from test_ops import NHD, make_cache

    from dougong.hal import LayerArgs, QKVShape
    from dougong_cpu import ops

    _, cache, _ = make_cache(NHD, torch.float32, torch.float32)
    one = torch.zeros(1, dtype=torch.int64)
    ops.qk_norm_rope_write(torch.zeros(1, 512), QKVShape(4, 2, 64, 64), None, one, LayerArgs(), cache, one)
    held = weakref.ref(cache)
    del cache, _
    gc.collect()
    assert held() is None
