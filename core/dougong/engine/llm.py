"""Offline use: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dougong.config import engine_config_from_options
from dougong.engine.beam import BeamSearchOutput, BeamSearchParams, beam_search
from dougong.engine.engine import Engine
from dougong.engine.prompt import Prompt, check_unicode
from dougong.engine.vectors import unit
from dougong.errors import ConfigError, EngineError, InvalidRequestError
from dougong.plugins import Plugins
from dougong.types import RequestOutput, SamplingParams

__all__ = ["LLM"]

Message = Mapping[str, Any]


class LLM:
    """A model loaded for offline generation, with the names that vLLM's users know.

    Example:
        >>> llm = LLM(model="smollm2-135m")
        >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text

    Args:
        model: a local folder, a .gguf file, a hub id, or ``smollm2-135m`` (the packaged model).
        options: those of `dougong.config.EngineConfig` (dtype, backend, max_model_len, …).

    Raises:
        DougongError: an option, a plugin, the model or the memory stops the start; it says what to do.
    """

    def __init__(self, model: str = "smollm2-135m", *, plugins: Plugins | None = None, **options: Any) -> None:
        self.engine = Engine(engine_config_from_options(model, **options), plugins=plugins)
        self._requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the prompts' order.

        A prompt is a string, a list of token ids, or a mapping with ``prompt`` or ``prompt_token_ids``.

        Raises:
            InvalidRequestError: a prompt or an option cannot be served; nothing is started.
        """
        items = self._list(prompts)
        samplings = self._spread("sampling_params", sampling_params or SamplingParams(), SamplingParams, len(items))
        priorities = self._spread("priority", priority, int, len(items))
        outputs: list[RequestOutput] = []
        try:
            for prompt, sampling, level in zip(items, samplings, priorities, strict=True):
                outputs.append(self.engine.add(self._name(), prompt, sampling, priority=level))
            self._run(outputs, use_tqdm)
        except BaseException:
            for output in outputs:
                self.engine.abort(output.request_id)
            raise
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, giving its growing output after each step that changed it."""
        output = self.engine.add(self._name(), prompt, sampling_params)
        try:
            while not output.finished:
                if any(changed is output for changed in self.engine.step()):
                    yield output
        finally:
            self.engine.abort(output.request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations (one, or a list of them) through the model's chat template.

        Raises:
            ConfigError: the model has no chat template and none is given.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts: list[Prompt] = [
            self.chat_prompt(one, add_generation_prompt=add_generation_prompt, tools=tools, chat_template=chat_template)
            for one in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[list[float]]:
        """Each prompt's vector, out of the final hidden states; [hidden size].

        Args:
            pooling: ``last`` token, ``mean`` of all, or ``cls`` (the first): what the model was trained for.
            normalize: to length 1.

        Raises:
            InvalidRequestError: a prompt cannot be served, or there is no such pooling.
            EngineError: a step failed.
        """
        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, pooling=pooling)
        found = []
        for output in self.generate(prompts, sampling, use_tqdm=use_tqdm):
            if output.embedding is None:
                raise EngineError(output.outputs[0].error or "the engine gave no vector")
            found.append(unit(output.embedding) if normalize else output.embedding)
        return found

    def chat_prompt(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> dict[str, Any]:
        """A conversation as the prompt that `generate` takes.

        Raises:
            ConfigError: the model has no chat template and none is given.
            InvalidRequestError: the template does not accept these messages, or they are no Unicode.
        """
        tokenizer = self.get_tokenizer()
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{self.model_path} has no chat template. Give chat_template=…, or use generate() with plain text."
            )
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) if tools else None,
                chat_template=chat_template,
            )
        except Exception as error:  # a template says "roles must alternate" and the like by an exception of jinja's
            raise InvalidRequestError(
                f"the chat template does not accept these messages: {type(error).__name__}: {error}"
            ) from error
        check_unicode("the conversation", text)
        return {"prompt": text, "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest completions of each prompt, found by beam search."""
        return [beam_search(self.engine, prompt, params, self._name) for prompt in self._list(prompts)]

    def get_tokenizer(self) -> Any:
        """The model's transformers tokenizer.

        Raises:
            ConfigError: the engine was told to skip it.
        """
        if self.engine.tokenizer is None:
            raise ConfigError("this LLM was made with skip_tokenizer_init=True and has no tokenizer.")
        return self.engine.tokenizer

    @property
    def model_path(self) -> Path:
        """The folder the weights were loaded from, readable by transformers."""
        return self.engine.model_path

    def close(self) -> None:
        """Free the device."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------

    def _run(self, outputs: list[RequestOutput], use_tqdm: bool) -> None:
        started = self.engine.stats.generated_tokens
        with tqdm(total=len(outputs), desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while self.engine.has_work:
                for output in self.engine.step():
                    if output.finished:
                        seconds = max(bar.format_dict["elapsed"], 1e-9)
                        rate = (self.engine.stats.generated_tokens - started) / seconds
                        bar.set_postfix_str(f"{rate:,.1f} tokens/s", refresh=False)
                        bar.update()

    def _name(self) -> str:
        self._requests += 1
        return str(self._requests)

    @staticmethod
    def _list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
        if isinstance(prompts, (str, Mapping, bytes, bytearray)) or not isinstance(prompts, Iterable):
            return [prompts]  # what is no prompt is refused by the engine
        items = list(prompts)
        if items and isinstance(items[0], int):
            return [items]
        return items

    @staticmethod
    def _spread(name: str, value: Any, kind: type, count: int) -> Iterable[Any]:
        if isinstance(value, kind) or not isinstance(value, Iterable):
            return [value] * count  # what is of another kind is refused by the engine
        values = list(value)
        if len(values) != count:
            raise InvalidRequestError(f"{name} has {len(values)} entries for {count} prompts: give one, or one each.")
        return values
