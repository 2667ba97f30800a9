"""benchmarks/peers/attention.py without a GPU: what is asked, whose turn it is, what is told, which peer is best."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("peers_attention", BENCHMARKS / "peers" / "attention.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["peers_attention"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["peers_attention"], sys.modules["attention_cases"]


class Case:
    """Two rows of 40 tokens in pages of 16, on the CPU, with the names of the benchmark's own."""

    def __init__(self, script: Any, kind: str = "decode") -> None:
        torch.manual_seed(0)
        self.script, self.kind, self.rows, self.length, self.heads = script, kind, 2, 40, 4
        self.q_len = 1 if kind == "decode" else 40
        self.kv = torch.randn(6, 2, 16, 2, 8)
        self.k, self.v = self.kv[:, 0], self.kv[:, 1]
        self.table = torch.tensor([[4, 1, 0], [3, 5, 2]], dtype=torch.int32)
        self.q = torch.randn(2 * self.q_len, 4, 8)
        self.out = torch.empty_like(self.q)
        self.cu = torch.arange(3, dtype=torch.int32) * self.q_len
        self.kv_len = torch.full((2,), 40, dtype=torch.int32)
        self.shape = SimpleNamespace(num_heads=4, num_kv_heads=2, head_dim=8, block_size=16, scale=8**-0.5)

    def error(self) -> float:
        return float(self.script.Case.error(self))

    def rate(self, us: float) -> float:
        return 1000 / us

    def attend(self, begins: torch.Tensor, blocks: torch.Tensor, full: torch.Tensor, out: torch.Tensor) -> None:
        """Causal attention from what a peer is given: where each row's blocks begin, which, how full the last is."""
        for row in range(self.rows):
            mine = blocks[int(begins[row]) : int(begins[row + 1])].long()
            keys = (len(mine) - 1) * 16 + int(full[row])
            k, v = (x[mine].flatten(0, 1)[:keys].repeat_interleave(2, 1) for x in (self.k, self.v))
            place = slice(row * self.q_len, (row + 1) * self.q_len)
            scores = torch.einsum("qhd,khd->hqk", self.q[place], k) * 8**-0.5
            hidden = torch.ones(self.q_len, keys, dtype=torch.bool).triu(keys - self.q_len + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
            out[place] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    def right(self) -> None:
        self.attend(torch.tensor([0, 3, 6]), self.table.reshape(-1), torch.tensor([8, 8]), self.out)


class Clock:
    """Stands in for the device's: each run takes what its engine says."""

    flush_us = 100.0

    def __init__(self, us: dict[Any, float], host: float = 20.0) -> None:
        self.us, self.host_us, self.log = us, host, []  # type: ignore[var-annotated]

    def sync(self) -> None: ...

    def once(self, run: Callable[[], Any]) -> float:
        self.log.append(run)
        run()
        return self.us[run]

    def host(self, run: Callable[[], Any]) -> float:
        return self.host_us

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        replay = lambda: run()  # noqa: E731
        self.us[replay] = self.us[run] - 1
        return replay


def test_what_is_asked(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    a = script.arguments([])
    assert len(a.cases) == 10
    assert ("decode", 64, 4096, 16, 8) in a.cases and ("decode", 1, 65536, 32, 8) in a.cases
    assert ("prefill", 1, 8192, 32, 8) in a.cases and a.peers == list(script.PEERS) and a.flush_mib == 512
    a = script.arguments(["--decode", "2:48:16/4", "--prefill", "", "--peers", "fi_fa2,fa3"])
    assert a.cases == [("decode", 2, 48, 16, 4)]
    assert list(script.engines_for("decode", a.peers)) == ["dougong", "fi_fa2", "fa3"]
    assert list(script.engines_for("prefill", list(script.PEERS))) == ["dougong", "fa3", "fi_fa2", "fi_fa3"]
    for wrong in (
        ["--peers", "fa3,fa9"],
        ["--decode", "1"],
        ["--decode", "1:2:3/1:4"],
        ["--decode", "", "--prefill", ""],
    ):
        with pytest.raises(SystemExit):
            script.arguments(wrong)
    assert "fa9 unknown" in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["--decode", "1:64", "--prefill", "", "--peers", "fa3"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "1 cases of dougong beside fa3 on one NVIDIA GPU; found:" in said.err


def test_engines_take_turns_and_the_first_runs_do_not_count(script: Any) -> None:
    log: list[str] = []

    def once(run: Callable[[], str]) -> float:
        log.append(run())
        if log.count("c") == 5 and log[-1] == "c":
            raise RuntimeError("the device is gone")
        return float(len(log))

    lanes = {name: lambda name=name: name for name in "abc"}
    times, lost = script.take_turns(lanes, once, rounds=2, runs=2)
    assert "".join(log) == "aaabbbccc" + "bbbccaaa" + "aaabbb", "in rounds, another beginning each time"
    assert times["b"] == [11, 12, 22, 23] and times["a"] == [16, 17, 19, 20]
    assert lost == {"c": "RuntimeError: the device is gone"}


def test_a_peer_that_fails_is_told_and_the_others_go_on(script: Any) -> None:
    case = Case(script)
    us: dict[Any, float] = {}

    def engine(takes: float, run: Callable[[], Any]) -> Callable[[Any], Callable[[], Any]]:
        us[run] = takes
        return lambda _: run

    def absent(_: Any) -> Any:
        raise ImportError("No module named 'flashinfer'")

    class Uncaptured(Clock):
        def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
            if self.us[run] == 30:
                raise RuntimeError("operation not permitted when stream is capturing")
            if self.us[run] == 40:  # something that a capture did not see
                replay = lambda: None  # noqa: E731
                self.us[replay] = 1
                return replay
            return super().capture(run)

    engines = {
        "dougong": engine(50, lambda: case.right()),
        "fa3": engine(30, lambda: case.right()),
        "fi_dec": absent,
        "fi_dec_tc": engine(40, lambda: case.right()),
        "fi_fa2": engine(10, lambda: case.out.fill_(0.5)),
        "fi_fa3": engine(60, lambda: case.right()),
    }
    rows = script.measure(case, engines, Uncaptured(us), 2, 3)
    by = {row["engine"]: row for row in rows}
    assert list(by) == list(engines)
    assert by["fi_dec"]["error"] == "ImportError: No module named 'flashinfer'" and by["fi_dec"]["us_p50"] is None
    assert "wrong answer" in by["fi_fa2"]["error"] and by["fi_fa2"]["us_p50"] is None
    assert by["fa3"]["us_p50"] == 30 and by["fa3"]["graph_us"] is None and "capturing" in by["fa3"]["graph_error"]
    assert by["fi_dec_tc"]["us_p50"] == 40 and by["fi_dec_tc"]["graph_us"] is None
    assert "wrong answer, relative error nan" in by["fi_dec_tc"]["graph_error"]
    ours = by["dougong"]
    assert (ours["us_p50"], ours["graph_us"], ours["rate"], ours["host_us"], ours["host_bound"]) == (
        50,
        49,
        20,
        20,
        False,
    )
    assert ours["relative_error"] < 1e-5
    assert script.measure(case, {"dougong": engines["dougong"]}, Clock(us, host=95.0), 1, 2)[0]["host_bound"] is True
    json.dumps(rows, allow_nan=False)

    direct, graph = script.compare(rows, "us_p50"), script.compare(rows, "graph_us")
    assert (direct["peer"], direct["ratio"]) == ("fa3", 30 / 50)
    assert (graph["peer"], graph["ratio"]) == ("fi_fa3", 59 / 49), "who has no replay is not compared with replays"


def rows_of(script: Any, batch: int, **engines: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    facts = dict(kind="decode", batch=batch, ctx=4096, hq=32, hkv=8)
    return [
        facts | script.blank(name, None if us else "ImportError: no") | dict(us_p50=us, graph_us=graph)
        for name, (us, graph) in engines.items()
    ]


def test_the_table_has_the_worst_first(script: Any) -> None:
    good = rows_of(script, 1, dougong=(20.0, 19.0), fa3=(30.0, 25.0), fi_dec=(25.0, 38.0))
    worse = rows_of(script, 16, dougong=(100.0, 100.0), fa3=(95.0, 120.0), fi_dec=(99.0, 93.0))
    alone = rows_of(script, 64, dougong=(50.0, 49.0), fa3=(None, None))
    good[2]["host_bound"] = good[1]["host_bound"] = True
    lines = script.table([good, worse, alone])
    first, second, third = (" ".join(line.split()) for line in lines[2:5])
    assert first == "decode 64 x 4,096 32/8 | 49.0 - - - | 50.0 - - -"
    assert second == "decode 16 x 4,096 32/8 | 100.0 93.0 fi_dec 0.93 | 100.0 95.0 fa3 0.95"
    assert third == "decode 1 x 4,096 32/8 | 19.0 25.0 fa3 1.32 | 20.0 25.0* fi_dec 1.25"
    assert lines[5].startswith("* the host's call takes longer")
    assert lines[6:] == ["decode    64 x  4,096  32/8: fa3 was not measured: ImportError: no"]
    assert len({line.index("|") for line in lines[:5]}) == 1


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_each_peer_is_given_the_same_cache(script: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the libraries' signatures compute from what they are given."""
    case = Case(script, kind)

    def schedule(
        batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
        cache_seqlens: torch.Tensor, qkv_dtype: torch.dtype, cu_seqlens_q: torch.Tensor, page_size: int, causal: bool,
    ) -> Any:  # fmt: skip
        assert (batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv) == (2, case.q_len, 40, 4, 2)
        assert (headdim, page_size, causal, cache_seqlens.tolist()) == (8, 16, True, [40, 40])
        return "schedule"

    def varlen(
        q: Any, k: torch.Tensor, v: Any, max_seqlen_q: int, cu_seqlens_q: Any, max_seqlen_k: int, seqused_k: Any,
        softmax_scale: float, causal: bool, block_table: Any, out: Any, scheduler_metadata: Any, fa_version: int,
    ) -> None:  # fmt: skip
        assert (scheduler_metadata, fa_version, causal, softmax_scale) == ("schedule", 3, True, 8**-0.5)
        assert k.data_ptr() == case.kv.data_ptr()
        rows, blocks = block_table.shape
        case.attend(torch.arange(rows + 1) * blocks, block_table.reshape(-1), (seqused_k - 1) % 16 + 1, out)

    class Wrapper:
        def __init__(self, room: torch.Tensor, layout: str, **more: Any) -> None:
            assert layout == "NHD" and more in ({"use_tensor_cores": True}, {"use_tensor_cores": False}, *BACKENDS)

        def plan(self, *given: Any, q_data_type: Any, kv_data_type: Any, sm_scale: float, causal: bool = False) -> None:
            *self.pages, heads, kv_heads, dim, page = given
            assert (heads, kv_heads, dim, page, sm_scale) == (4, 2, 8, 16, 8**-0.5)
            if causal:
                assert self.pages.pop(0).tolist() == case.cu.tolist()

        def run(self, q: Any, kv: torch.Tensor, out: torch.Tensor) -> None:
            assert kv.data_ptr() == case.kv.data_ptr()
            case.attend(*self.pages, out)

    BACKENDS = ({"backend": "fa2"}, {"backend": "fa3"})
    vllm, infer = ModuleType("vllm.vllm_flash_attn"), ModuleType("flashinfer")
    vars(vllm).update(flash_attn_varlen_func=varlen, get_scheduler_metadata=schedule)
    vars(infer).update(BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    vars(infer).update(__version__="0.6")
    for name, module in {"vllm": ModuleType("vllm"), "vllm.vllm_flash_attn": vllm, "flashinfer": infer}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(script, "workspace", lambda: torch.empty(0))
    engines = script.engines_for(kind, list(script.PEERS))
    assert engines.pop("dougong") is script.dougong
    for name, make in engines.items():
        assert script.answer(case, make(case), Clock({})) < 1e-5, name
    assert script.versions("fi_fa2")["flashinfer"] == "0.6"
    assert script.versions("fa3")["torch"] == torch.__version__
