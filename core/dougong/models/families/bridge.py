"""Every other attention-only decoder: transformers' own modelling code with this core's attention put in.

The model sees one row of all the step's tokens with their positions; attention is exchanged through transformers'
AttentionInterface, linear layers for the device's products. What each layer asks of attention is learnt from a trial
run of one token, so that nothing about a model has to be known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from dougong.errors import ConfigError, ModelLoadError, UnsupportedModelError
from dougong.hal import AttentionSpec, LayerArgs
from dougong.models.base import CausalLM, Loadable
from dougong.models.build import Builder
from dougong.models.context import StepContext
from dougong.models.families.bridge_checks import DECODERS_EMBED, refuse_class, refuse_config, refuse_modules
from dougong.models.layers.attention import AttentionLayer
from dougong.models.loading.dummy import DummyWeights
from dougong.models.loading.safetensors import SafetensorsWeights
from dougong.models.weights import WeightSource

__all__ = ["TransformersForCausalLM"]

_NAME = "dougong"
#: Tensors that models hand to attention and that change nothing here.
_HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
_SLOT = "_dougong_attention"


class TransformersForCausalLM(CausalLM):
    """A model of ``AutoModelForCausalLM``. Not divided over ranks."""

    # Modelling code asks the host now and then (dynamic rope, experts).
    capturable: ClassVar[bool] = False

    def __init__(self, build: Builder) -> None:
        super().__init__(build)
        architecture = build.config.architecture
        refuse_config(build.config.hf, architecture)
        if build.size > 1:
            raise ConfigError(
                f"tensor_parallel_size={build.size}: {architecture} runs through transformers' code, which is not "
                "divided over ranks here. Native families are."
            )
        self._build = build
        self._ctx: StepContext | None = None

    def parts(self) -> Iterator[Loadable]:
        return iter(())

    def load(self, source: WeightSource) -> None:
        """Let transformers load the checkpoint (its own renames and merges included), then exchange the parts.

        Raises:
            UnsupportedModelError: the model cannot run over a paged cache, with the reason.
            ModelLoadError: tensors are missing, of another shape, or would not be read.
        """
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            self.inner = self._make(source)
        refuse_modules(self.inner, self.config.architecture)
        self.inner.to(self.device).eval().requires_grad_(False)
        self._exchange_linears()
        prefix = self.inner.base_model_prefix
        self.body = getattr(self.inner, prefix)
        self._learn_attention()
        # From here on the outer model only turns hidden states into logits, its own scaling and capping included.
        setattr(self.inner, prefix, _Given())

    def _make(self, source: WeightSource) -> Any:
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

        AttentionInterface.register(_NAME, _attend)
        architecture = self.config.architecture
        config = (
            AutoConfig.from_pretrained(str(source.folder)) if isinstance(source, SafetensorsWeights) else self.config.hf
        )
        try:
            kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
        except KeyError:
            raise UnsupportedModelError(
                f"{architecture} (model type {config.model_type!r}) is no causal language model of the "
                f"installed transformers; encoders are not run. {DECODERS_EMBED}"
            ) from None
        refuse_class(kind, architecture)
        if isinstance(source, DummyWeights):
            torch.manual_seed(source.seed)
            return kind._from_config(config, dtype=self.dtype, attn_implementation=_NAME)
        if not isinstance(source, SafetensorsWeights):
            raise UnsupportedModelError(f"{architecture} loads from safetensors only, not from {source.description}.")
        try:
            model, info = kind.from_pretrained(
                str(source.folder), dtype=self.dtype, attn_implementation=_NAME, output_loading_info=True
            )
        except Exception as error:
            raise ModelLoadError(
                f"transformers cannot load {source.folder} as {architecture}: {type(error).__name__}: {error}"
            ) from error
        wrong = {
            what: sorted(map(str, info.get(key) or ()))
            for key, what in (
                ("missing_keys", "missing"),
                ("mismatched_keys", "of another shape"),
                ("unexpected_keys", "not part of the model"),
            )
        }
        complaints = [f"{len(names)} {what} ({', '.join(names[:4])})" for what, names in wrong.items() if names]
        if complaints:
            raise ModelLoadError(f"the weights in {source.folder} do not match the config: {'; '.join(complaints)}.")
        return model

    def _exchange_linears(self) -> None:
        formats = self._build.weight_format
        head = self.inner.get_output_embeddings()
        for name, module in list(self.inner.named_modules()):
            if type(module) is not nn.Linear:
                continue
            format = formats.head if module is head else formats.linear
            if name.rsplit(".", 1)[-1] in ("gate", "router"):
                format = "dense"
            parent, _, attribute = name.rpartition(".")
            setattr(self.inner.get_submodule(parent), attribute, _PackedLinear(self._build, module, format))

    def _learn_attention(self) -> None:
        """Run one token and see what each layer hands to attention."""
        found: list[tuple[nn.Module, AttentionSpec, LayerArgs]] = []
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with torch.inference_mode(), _recording(_Recorder(self, found)):
            self.body(input_ids=token, position_ids=token, use_cache=False)
        architecture, count = self.config.architecture, self.config.num_layers
        if len(found) != count or len({id(module) for module, _, _ in found}) != count:
            raise UnsupportedModelError(
                f"{architecture} has {count} layers and called attention {len(found)} times; only models with one "
                "attention in each layer are supported."
            )
        for index, (module, spec, args) in enumerate(found):
            layer = _BridgedAttention(self, index, spec, args)
            setattr(module, _SLOT, layer)
            self.attentions.append(layer)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        self._ctx = ctx
        done = self.body(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        hidden: torch.Tensor = done[0][0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def context(self) -> StepContext:
        assert self._ctx is not None
        return self._ctx


class _BridgedAttention(AttentionLayer):
    def __init__(self, owner: TransformersForCausalLM, layer: int, spec: AttentionSpec, args: LayerArgs) -> None:
        super().__init__(layer, spec, args)
        self._owner = owner

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, H, T, D], k [1, K, T, D], v [1, K, T, Dv] -> [1, T, H, Dv]."""
        ctx, group = self._owner.context(), self.group_index
        cache, kernel = ctx.caches[self.cache_layer], ctx.kernels[group]
        q, k, v = (one[0].transpose(0, 1).contiguous() for one in (q, k, v))
        kernel.write(self.args, k, v, cache, ctx.slots[group])
        out = q.new_empty((q.shape[0], self.spec.num_heads, self.spec.head_dim_v))
        kernel.run(ctx.plans[group], self.args, q, cache, out=out)
        return out[None]


class _Recorder:
    """Stands in for attention during the trial run."""

    def __init__(self, owner: TransformersForCausalLM, found: list[tuple[nn.Module, AttentionSpec, LayerArgs]]) -> None:
        self.owner, self.found = owner, found

    def see(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, given: dict[str, Any]
    ) -> torch.Tensor:
        architecture = self.owner.config.architecture
        odd = [name for name, value in given.items() if isinstance(value, torch.Tensor) and name not in _HARMLESS]
        sinks = given.get("s_aux")
        odd = [name for name in odd if name != "s_aux"]
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is not None or odd or not causal or q.shape[2] != k.shape[2]:
            what = "a mask of its own" if mask is not None else ", ".join(odd) or "attention that is not causal"
            raise UnsupportedModelError(
                f"{architecture} hands {what} to attention, which has no place in a paged cache."
            )
        self.found.append(
            (
                module,
                AttentionSpec(
                    num_heads=q.shape[1],
                    num_kv_heads=k.shape[1],
                    head_dim=q.shape[3],
                    head_dim_v=v.shape[3],
                    scale=float(given.get("scaling") or q.shape[3] ** -0.5),
                    window=self._window(given),
                    softcap=given.get("softcap"),
                    sinks=sinks is not None,
                    dtype=self.owner.dtype,
                    kv_dtype=self.owner._build.specs[0].kv_dtype,
                ),
                LayerArgs(sinks=None if sinks is None else sinks.detach().float()),
            )
        )
        return q.new_zeros((1, q.shape[2], q.shape[1], v.shape[3]))

    def _window(self, given: dict[str, Any]) -> int | None:
        """Some models hand the window to attention, others only mask by it; where both say something they agree."""
        layer = self.owner.config.layers[min(len(self.found), len(self.owner.config.layers) - 1)]
        window = given.get("sliding_window")
        if getattr(self.owner.config.hf, "layer_types", None):
            return layer.window
        return int(window) if window else None


class _PackedLinear(nn.Module):
    """nn.Linear through the device's product."""

    def __init__(self, build: Builder, linear: nn.Linear, format: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel = build.linear_kernel(linear.in_features, linear.out_features, format)
        self.packed = self.kernel.prepare(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply(x, self.packed, self.bias)


class _Given(nn.Module):
    """Stands where the decoder was and answers what it is given as embeddings."""

    def forward(self, *ignored: Any, inputs_embeds: torch.Tensor, **also_ignored: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


class _Hidden:
    """A decoder's output of hidden states only, whatever else its kind has a field for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


_recorder: _Recorder | None = None


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer."""
    if _recorder is not None:
        return _recorder.see(module, query, key, value, attention_mask, given), None
    layer: _BridgedAttention = getattr(module, _SLOT)
    return layer.run(query, key, value), None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars: the caller shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
