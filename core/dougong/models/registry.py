"""Which class runs which architecture."""

from __future__ import annotations

from dougong.errors import PluginAnswerError, UnsupportedModelError
from dougong.models.base import CausalLM
from dougong.models.config import ModelConfig
from dougong.plugins import ABI, ModelSpec, Plugins, resolve_target

__all__ = ["NATIVE", "find_model"]


def _family(module: str, *architectures: str) -> ModelSpec:
    return ModelSpec(
        architectures=architectures, abi=ABI, target=f"dougong.models.families.{module}:{architectures[0]}"
    )


#: The families of the core itself, each written for paged caches and fused ops.
NATIVE: tuple[ModelSpec, ...] = (
    _family("llama", "LlamaForCausalLM", "MistralForCausalLM"),
    _family("qwen2", "Qwen2ForCausalLM"),
    _family("qwen3", "Qwen3ForCausalLM"),
    _family("gemma2", "Gemma2ForCausalLM"),
    _family("gemma3", "Gemma3ForCausalLM"),
    _family("phi3", "Phi3ForCausalLM"),
    _family("mixtral", "MixtralForCausalLM"),
    _family("qwen3_moe", "Qwen3MoeForCausalLM"),
)
_BRIDGE = "dougong.models.families.bridge:TransformersForCausalLM"


def find_model(config: ModelConfig, plugins: Plugins | None = None) -> type[CausalLM]:
    """The class for ``config``: a plugin's, the core's own, or the bridge to transformers' modelling code.

    Raises:
        UnsupportedModelError: the config names no architecture.
        PluginAnswerError: a plugin's class cannot be imported or is no CausalLM.
    """
    if not config.architecture:
        raise UnsupportedModelError(
            f"config.json of model type {config.model_type!r} names no architecture; add "
            f'"architectures": ["…ForCausalLM"]. Native are {", ".join(native_architectures())}.'
        )
    for plugin, spec in plugins.records("dougong_models") if plugins is not None else []:
        if config.architecture in spec.architectures:
            try:
                found = resolve_target(spec.target)
            except (ImportError, AttributeError) as error:
                raise PluginAnswerError(
                    f"plugin {plugin!r} offers {config.architecture} as {spec.target}, which cannot be "
                    f"imported: {error}",
                    plugin=plugin,
                ) from error
            if not (isinstance(found, type) and issubclass(found, CausalLM)):
                raise PluginAnswerError(f"plugin {plugin!r}: {spec.target} is no CausalLM.", plugin=plugin)
            return found
    target = next((spec.target for spec in NATIVE if config.architecture in spec.architectures), _BRIDGE)
    native: type[CausalLM] = resolve_target(target)
    return native


def native_architectures() -> list[str]:
    """Names of all architectures that have a native family."""
    return [name for spec in NATIVE for name in spec.architectures]
