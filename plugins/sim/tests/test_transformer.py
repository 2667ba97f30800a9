"""A whole transformer of another library runs on the device and gives the CPU's results."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_llama_generates() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 100, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        want, tokens = model(ids).logits, model.generate(ids, **options)
        moved = model.to("sim")
        got = moved(ids.to("sim")).logits
        again = moved.generate(ids.to("sim"), **options)
    assert got.device.type == "sim"
    torch.testing.assert_close(got.cpu(), want)
    assert torch.equal(again.cpu(), tokens)
