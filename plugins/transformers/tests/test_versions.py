"""Another transformers than those tried: said, and what looks different is left to transformers to refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import dougong_transformers
import pytest
import torch
from dougong_transformers import continuous, versions
from transformers.generation.continuous_batching import continuous_api


def test_the_version_of_this_environment_is_one_that_was_tried() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dougong_transformers.register()


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TRIED", ("9.8",))
    with pytest.warns(UserWarning, match=r"was run with transformers 9\.8; this is 5\."):
        versions.check_version()


def test_continuous_batching_that_looks_different_is_left_alone(
    pair: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair("llama")

    class Other:
        def switch_to_cb_friendly_attn(self, network: Any) -> None: ...

    monkeypatch.setattr(continuous_api, "ContinuousBatchingManager", Other)
    with pytest.warns(UserWarning, match="takes no model"):
        continuous.admit()
    assert not hasattr(Other.switch_to_cb_friendly_attn, "_dougong")
    with torch.no_grad():
        assert ours(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_device_without_a_backend_is_refused_as_transformers_refuses() -> None:
    from dougong_transformers.kernels import kernel_for

    from dougong.hal import AttentionSpec

    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"(?s)no backend for tensors on 'meta'.*Or use attn_implementation='sdpa'"):
        kernel_for(torch.device("meta"), spec, 0, 1, 1, 1)
