"""Opening a backend and choosing kernels, with the reasons kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dougong.errors import BackendNotFoundError, KernelSelectionError, PluginAnswerError
from dougong.hal import (
    HND,
    NHD,
    X_PACKED,
    AttentionQuery,
    AttentionSpec,
    KVLayout,
    LinearQuery,
    Multiple,
    Refusal,
    find_backends,
    open_backend,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong.hal.reference.ops import silu_mul
from dougong.plugins import ABI, BackendSpec, KernelSpec, Probe, hookimpl, load_plugins


class Plugin:
    """A plugin made of lists."""

    def __init__(self, *backends: BackendSpec, kernels: tuple[KernelSpec, ...] = ()) -> None:
        self.backends, self.kernels = backends, kernels

    @hookimpl
    def dougong_backends(self) -> Any:
        return self.backends

    @hookimpl
    def dougong_kernels(self, device: Any) -> Any:
        return self.kernels


def backend(name: str = "plain", **more: Any) -> BackendSpec:
    return BackendSpec(**{"name": name, "abi": ABI, "target": "dougong_test_targets:PlainDevice", **more})


def kernel(op: str, name: str, provider: str, **more: Any) -> KernelSpec:
    return KernelSpec(op=op, provider=provider, abi=ABI, target=f"dougong_test_targets:{name}", **more)


def plugins(*made: Plugin) -> Any:
    return load_plugins("", entries=[], extra=[(f"p{i}", plugin) for i, plugin in enumerate(made)])


def query(**more: Any) -> AttentionQuery:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32, **more)
    return AttentionQuery(spec=spec, layout=NHD, block_size=16)


def test_the_best_that_probes_well_is_opened_and_a_negative_score_never_by_itself(targets: Any) -> None:
    no = lambda: Probe(ok=False, reason="no such card", remedy="Buy one.")  # noqa: E731
    made = plugins(Plugin(backend("low"), backend("high", score=5, probe=no), backend("hidden", score=-1)))
    assert open_backend(plugins=made).name == "low"
    assert open_backend("hidden", plugins=made).name == "hidden"
    assert [report.spec.name for report in find_backends(made)] == ["low", "hidden", "high"]
    with pytest.raises(BackendNotFoundError, match=r"no such card.*Buy one"):
        open_backend("high", plugins=made)


def test_the_environment_names_a_backend(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugins(Plugin(backend("a", score=9), backend("b")))
    monkeypatch.setenv("DOUGONG_BACKEND", "b")
    assert open_backend(plugins=made).name == "b"
    assert open_backend("a", plugins=made).name == "a"


def test_a_missing_backend_is_an_error_that_lists_what_was_found(targets: Any) -> None:
    with pytest.raises(BackendNotFoundError) as error:
        open_backend("tpu", plugins=plugins(Plugin(backend("plain"))))
    for part in ("'tpu'", "plain", "pip install dougong-tpu"):
        assert part in str(error.value)
    hidden = plugins(Plugin(backend("hidden", score=-1)))
    with pytest.raises(BackendNotFoundError, match="no backend can run"):
        open_backend(plugins=hidden)


def test_a_probe_that_raises_is_a_refusal_with_its_reason(targets: Any) -> None:
    def explode() -> Probe:
        raise OSError("driver says no")

    with pytest.raises(BackendNotFoundError, match="OSError: driver says no"):
        open_backend("plain", plugins=plugins(Plugin(backend(probe=explode))))


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("dougong_test_targets:Nothing", "Nothing"),
        ("no_such_module:X", "no_such_module"),
        ("dougong.hal:NHD", "expected"),
    ],
)
def test_a_backend_that_cannot_be_opened_says_why(targets: Any, target: str, problem: str) -> None:
    with pytest.raises(PluginAnswerError, match=problem):
        open_backend("plain", plugins=plugins(Plugin(backend(target=target))))


@pytest.mark.parametrize("method", ["__init__", "setup"])
def test_a_device_whose_driver_fails_is_an_error_with_its_words(targets: Any, method: str) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("invalid device ordinal")

    targets.Broken = type("Broken", (targets.PlainDevice,), {method: fail})
    probe = lambda: Probe(ok=True, devices=("one card",))  # noqa: E731
    made = plugins(Plugin(backend("card", target="dougong_test_targets:Broken", probe=probe)))
    with pytest.raises(BackendNotFoundError, match=r"'card' cannot open device 3: .*invalid device ordinal.*one card"):
        open_backend("card", index=3, plugins=made)


def test_two_backends_of_one_name_are_refused(targets: Any) -> None:
    with pytest.raises(PluginAnswerError, match="both bring"):
        open_backend(plugins=plugins(Plugin(backend()), Plugin(backend())))


def test_a_kernel_for_an_unknown_op_is_refused(targets: Any) -> None:
    with pytest.raises(PluginAnswerError, match="unknown op 'fly'"):
        open_backend(plugins=plugins(Plugin(backend(), kernels=(kernel("fly", "X", "acme"),))))


def test_selection_goes_by_priority_and_keeps_every_reason(targets: Any) -> None:
    class Picky(ReferenceAttention):
        @classmethod
        def supports(cls, query: AttentionQuery, device: Any) -> tuple[Refusal, ...]:
            return (Refusal("block size 16", nearest="128"),)

    targets.Picky = Picky
    targets.Good = type("Good", (ReferenceAttention,), {})
    kernels = (
        kernel("attention", "Picky", "picky", priority=9, features=frozenset({"window"})),
        kernel("attention", "Good", "old", priority=8),
        kernel("attention", "Good", "good", priority=5, features=frozenset({"window"})),
        kernel("attention", "Good", "absent", priority=7, unavailable="package acme is not installed"),
        kernel("attention", "Good", "half", priority=6, features=frozenset({"window"}), dtypes=frozenset({"float16"})),
        kernel("attention", "Good", "tiles", priority=6, features=frozenset({"window"}), layouts=("nz16",)),
    )
    opened = open_backend(plugins=plugins(Plugin(backend(), kernels=kernels)))
    choice = opened.choose_attention(query(window=8))
    assert choice.spec.provider == "good"
    reasons = {candidate.spec.provider: reason for candidate, reason in choice.refused}
    assert reasons["picky"] == "block size 16 (nearest: 128)"
    assert reasons["old"] == "lacks window"
    assert reasons["absent"] == "package acme is not installed"
    assert reasons["half"].startswith("dtype float32")
    assert reasons["tiles"].startswith("KV layout nhd")
    assert reasons["torch reference"].startswith("priority")


def test_a_feature_newer_than_the_plugin_is_refused_before_it_is_asked(targets: Any) -> None:
    class Careless(ReferenceAttention):
        @classmethod
        def supports(cls, query: AttentionQuery, device: Any) -> tuple[Refusal, ...]:
            raise AssertionError("asked about a feature it never heard of")

    targets.Careless = Careless
    opened = open_backend(plugins=plugins(Plugin(backend(), kernels=(kernel("attention", "Careless", "careless"),))))
    assert opened.choose_attention(query(sinks=True)).spec.provider == "torch reference"


def test_batch_invariance_is_given_only_by_those_that_declare_it(targets: Any) -> None:
    targets.Good = type("Good", (ReferenceAttention,), {})
    kernels = (
        kernel("attention", "Good", "fast", priority=2),
        kernel("attention", "Good", "steady", priority=1, batch_invariant=True),
    )
    asked = AttentionQuery(spec=query().spec, layout=NHD, block_size=16, batch_invariant=True)
    opened = open_backend(plugins=plugins(Plugin(backend(), kernels=kernels)))
    assert opened.choose_attention(query()).spec.provider == "fast"
    assert opened.choose_attention(asked).spec.provider == "steady"
    with pytest.raises(KernelSelectionError, match="does not declare itself batch-invariant"):
        open_backend(plugins=plugins(Plugin(backend(), kernels=kernels[:1]))).choose_attention(asked)


def test_a_cache_with_gaps_goes_to_those_that_declare_it(targets: Any) -> None:
    class Careless(ReferenceAttention):
        @classmethod
        def supports(cls, query: AttentionQuery, device: Any) -> tuple[Refusal, ...]:
            return (Refusal("too long", "64"),) if (query.max_kv_len or 0) > 64 else ()

    targets.Careless, targets.Good = Careless, type("Good", (ReferenceAttention,), {})
    kernels = (
        kernel("attention", "Careless", "dense", priority=2),
        kernel("attention", "Good", "any", priority=1, features=frozenset({"strided"})),
    )
    opened = open_backend(plugins=plugins(Plugin(backend(), kernels=kernels)))

    def chosen(**more: Any) -> str:
        return opened.choose_attention(replace(query(), **more)).spec.provider

    assert chosen() == chosen(max_kv_len=64) == "dense"
    assert chosen(max_kv_len=65) == chosen(strided=True) == "any"


def test_kernels_are_offered_to_a_backend_by_its_name(targets: Any) -> None:
    class Two(Plugin):
        @hookimpl
        def dougong_kernels(self, device: Any, backend: str) -> Any:  # type: ignore[override]
            return self.kernels if backend == "b" else []

    made = plugins(Two(backend("a"), backend("b"), kernels=(kernel("silu_mul", "PlainDevice", "own"),)))
    assert "silu_mul" not in open_backend("a", plugins=made).candidates
    assert [one.spec.provider for one in open_backend("b", plugins=made).candidates["silu_mul"]] == ["own"]


def test_one_layout_comes_with_every_kernels_block_sizes(targets: Any) -> None:
    big = KVLayout("nhd", block_sizes=Multiple(64), default_block=64)
    targets.Big = type("Big", (ReferenceAttention,), {"layouts": (big,)})
    targets.Any = type("Any", (ReferenceAttention,), {"layouts": (NHD, HND)})
    targets.Absent = type("Absent", (ReferenceAttention,), {"layouts": (X_PACKED,)})
    kernels = (
        kernel("attention", "Any", "any", priority=1),
        kernel("attention", "Big", "big", priority=2),
        kernel("attention", "Absent", "absent", priority=3, unavailable="not here"),
    )
    assert open_backend(plugins=plugins(Plugin(backend(), kernels=kernels))).layouts() == [big, NHD, HND]
    assert open_backend(plugins=plugins(Plugin(backend()))).layouts() == [NHD]


def test_asking_for_one_provider_makes_its_refusal_an_error(targets: Any) -> None:
    targets.Good = type("Good", (ReferenceAttention,), {})
    opened = open_backend(plugins=plugins(Plugin(backend(), kernels=(kernel("attention", "Good", "good"),))))
    assert opened.choose_attention(query(), provider="good").spec.provider == "good"
    with pytest.raises(KernelSelectionError, match="lacks softcap"):
        opened.choose_attention(query(softcap=1.0), provider="good")
    with pytest.raises(KernelSelectionError) as error:
        opened.choose_attention(query(softcap=1.0), provider="good")
    assert "torch reference" not in str(error.value)  # nobody asked for it
    with pytest.raises(KernelSelectionError, match=r"(?s)good.*'best' was asked for"):
        opened.choose_attention(query(), provider="best")


def test_a_plugin_may_choose_among_those_that_can(targets: Any) -> None:
    targets.A = type("A", (ReferenceAttention,), {})
    kernels = (kernel("attention", "A", "first", priority=2), kernel("attention", "A", "second", priority=1))

    class Chooser(Plugin):
        @hookimpl
        def dougong_select_kernel(self, op: str, query: Any, candidates: Any) -> Any:
            return candidates[-2]

    assert (
        open_backend(plugins=plugins(Chooser(backend(), kernels=kernels))).choose_attention(query()).spec.provider
        == "second"
    )


def test_functions_are_chosen_too_and_may_refuse_a_device(targets: Any) -> None:
    def fast(gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up)

    def never(gate_up: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    never.supports = lambda query, device: (Refusal(f"{query} needs a newer card"),)  # type: ignore[attr-defined]
    targets.fast, targets.never = fast, never
    kernels = (kernel("silu_mul", "never", "never", priority=9), kernel("silu_mul", "fast", "fast", priority=1))
    table = open_backend(plugins=plugins(Plugin(backend(), kernels=kernels))).op_table(torch.float32)
    assert table.silu_mul is fast
    assert "silu_mul in float32 needs a newer card" in {reason for _, reason in table.choices["silu_mul"].refused}
    assert table.choices["rope"].spec.provider == "torch reference"
    table = open_backend(plugins=plugins(Plugin(backend(), kernels=kernels))).op_table(
        torch.float32, providers={"silu_mul": "torch reference"}
    )
    assert table.silu_mul is silu_mul


def test_the_reference_serves_every_linear_format(targets: Any) -> None:
    opened = open_backend(plugins=plugins(Plugin(backend())))
    for form in ("dense", "int8", "int4"):
        linear = LinearQuery(in_features=64, out_features=8, dtype=torch.float32, format=form)
        made = opened.choose_linear(linear).target(linear, opened.device)
        weight, x = torch.randn(8, 64), torch.randn(3, 64)
        packed = made.prepare(weight)
        assert torch.allclose(made.apply(x, packed), x @ made.unpack(packed).T, atol=1e-5)
    odd = LinearQuery(in_features=40, out_features=8, dtype=torch.float32, format="int4")
    with pytest.raises(KernelSelectionError, match="do not divide 40"):
        opened.choose_linear(odd)


def test_accelerators_without_a_plugin_are_seen_by_their_drivers_files(tmp_path: Any) -> None:
    from dougong.hal.inventory import seen_accelerators

    assert seen_accelerators(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/davinci0").touch()
    assert [seen.product for seen in seen_accelerators(tmp_path)] == ["Ascend NPU"]
    (tmp_path / "sys/module/i915").mkdir(parents=True)  # the module alone may drive a display only
    assert len(seen_accelerators(tmp_path)) == 1
