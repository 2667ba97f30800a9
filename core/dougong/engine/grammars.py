"""Compiling structured outputs, through llguidance: away from the step, bounded in time and size, and kept."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from dougong.errors import ConfigError, InvalidRequestError
from dougong.execution import guides as protocols
from dougong.types import StructuredOutput

if TYPE_CHECKING:
    import llguidance

__all__ = ["CompiledGrammar", "GrammarCompiler"]

#: Grammars kept, and those compiled at a time.
_KEPT = 128
_THREADS = 2
#: What one grammar may cost. Fuel is llguidance's measure of work; these are some tenths of a second.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
#: A compilation that takes longer is refused. Python cannot end its thread: after some of these no other is begun.
_SECONDS = 10.0
_MOST_STUCK = 4
#: ``multipleOf`` is compiled into that many states, in which no limit of llguidance's shows.
_MOST_MULTIPLES = 1_000
#: A grammar of llama.cpp's: it begins with ``root ::=``.
_GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)
#: JSON may have this white space between its parts: enough for four levels indented by four, and an end to it, since
#: a small model can go on with spaces for ever.
_WHITE_SPACE = r"[ \n]{0,1}[ ]{0,16}"


class _Guide:
    """A completion's matcher (`dougong.execution.guides.Guide`)."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def error(self) -> str:
        return self.matcher.get_error()


class CompiledGrammar:
    """A structured output ready for use (`dougong.execution.guides.Grammar`).

    Args:
        matcher: at its start; each completion takes a copy.
        executor: llguidance's threads.
    """

    __slots__ = ("_executor", "_matcher")

    def __init__(self, matcher: llguidance.LLMatcher, executor: llguidance.LLExecutor) -> None:
        self._matcher = matcher
        self._executor = executor

    def start(self, tokens: Sequence[int]) -> _Guide:
        """A completion that has these tokens already."""
        matcher = self._matcher.deep_copy()
        if tokens:
            matcher.consume_tokens(list(tokens))
        return _Guide(matcher)

    def accept(self, guides: Sequence[protocols.Guide], tokens: Sequence[int]) -> None:
        """Go on by one token each."""
        self._executor.consume_token_par([(_matcher(guide), token) for guide, token in zip(guides, tokens)])

    def fill(self, guides: Sequence[protocols.Guide], bits: protocols.Bits) -> None:
        """Write the rows of ``bits`` of guides that go on."""
        live = [(_matcher(guide), row) for row, guide in enumerate(guides) if not _matcher(guide).is_stopped()]
        if live:
            self._executor.unsafe_compute_mask_ptr(live, bits.ctypes.data, bits.shape[1] * 4, bits.shape[0])


def _matcher(guide: protocols.Guide) -> llguidance.LLMatcher:
    assert isinstance(guide, _Guide)
    return guide.matcher


class GrammarCompiler:
    """Compiles each structured output once. Any thread may call it.

    Args:
        tokenizer: gives the model's transformers tokenizer; called when the first one is compiled.
        vocab_size: width of the logits.
        eos_token_ids: the tokens that may end a completion.
    """

    def __init__(self, tokenizer: Callable[[], Any], vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._load = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutput, Future[CompiledGrammar]] = OrderedDict()
        self._stuck: list[Future[CompiledGrammar]] = []
        self._settling = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._opening = threading.Lock()
        self._tools: tuple[Any, llguidance.LLTokenizer, llguidance.LLExecutor] | None = None

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        """The compiled grammar; waits for it.

        Raises:
            ConfigError: llguidance is missing, or cannot work with the model's tokenizer.
            InvalidRequestError: the grammar is wrong, allows nothing, or takes too much work or time.
        """
        return self.submit(structured).result()

    async def ready(self, structured: StructuredOutput) -> CompiledGrammar:
        """The same for a coroutine."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(structured)))

    def submit(self, structured: StructuredOutput) -> Future[CompiledGrammar]:
        """Compile on another thread; the future raises what `compile` raises."""
        with self._lock:
            found = self._kept.get(structured)
            if found is None or (found.done() and found.exception() is not None):
                found = self._kept[structured] = self._start(structured)
            self._kept.move_to_end(structured)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return found

    def _start(self, structured: StructuredOutput) -> Future[CompiledGrammar]:
        """Compile with a limit of time: the work's own future, and the one that is given out."""
        self._stuck = [future for future in self._stuck if not future.done()]
        promise: Future[CompiledGrammar] = Future()
        if len(self._stuck) >= _MOST_STUCK:
            promise.set_exception(
                InvalidRequestError(
                    f"{_name(structured)}: {len(self._stuck)} structured outputs that take too long are still being "
                    "compiled. Try again later."
                )
            )
            return promise
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "dougong-grammars")
        work = self._pool.submit(self._compile, structured)
        timer = threading.Timer(_SECONDS, self._late, (structured, work, promise))
        timer.daemon = True
        timer.start()

        def done(work: Future[CompiledGrammar]) -> None:
            timer.cancel()
            with self._settling:
                if promise.done():
                    return
                if work.cancelled():
                    promise.set_exception(InvalidRequestError(f"{_name(structured)}: the engine was closed."))
                elif (error := work.exception()) is not None:
                    promise.set_exception(error)
                else:
                    promise.set_result(work.result())

        work.add_done_callback(done)
        return promise

    def _late(
        self, structured: StructuredOutput, work: Future[CompiledGrammar], promise: Future[CompiledGrammar]
    ) -> None:
        """Leave a compilation that takes too long to its thread; the next ones get other threads."""
        with self._settling:
            if promise.done():
                return
            promise.set_exception(
                InvalidRequestError(
                    f"{_name(structured)}: compiling takes more than {_SECONDS:.0f} s. Make it simpler."
                )
            )
        with self._lock:
            if not work.done():
                self._stuck.append(work)
                if self._pool is not None:
                    self._pool.shutdown(wait=False)
                    self._pool = None

    def close(self) -> None:
        """End the threads; what is being compiled is given up."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, structured: StructuredOutput) -> CompiledGrammar:
        library, tokenizer, executor = self._open()
        try:
            grammar = _grammar(library, structured)
        except ValueError as error:
            raise InvalidRequestError(f"{_name(structured)}: {error}") from None
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise InvalidRequestError(f"{_name(structured)}: {_tidy(matcher.get_error())}")
        compiled = CompiledGrammar(matcher, executor)
        first = compiled.start(())
        compiled.fill([first], np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32))
        if first.error or first.complete:
            reason = _tidy(first.error) or "only the empty one"
            raise InvalidRequestError(f"{_name(structured)}: no text can be like this, or it is too hard: {reason}.")
        return compiled

    def _open(self) -> tuple[Any, llguidance.LLTokenizer, llguidance.LLExecutor]:
        with self._opening:
            if self._tools is None:
                try:
                    import llguidance
                except ImportError as error:
                    raise ConfigError(
                        "structured output needs llguidance, which is not installed: pip install 'dougong[structured]'."
                    ) from error
                self._tools = llguidance, self._tokenizer(llguidance), llguidance.LLExecutor()
            return self._tools

    def _tokenizer(self, library: Any) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance sees it, built once (tenths of a second)."""
        tokenizer = self._load()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"structured output needs a tokenizer of the tokenizers library; this model's is a "
                f"{type(tokenizer).__name__}. Name another with tokenizer=."
            )
        plain = copy(backend)
        plain.no_padding()
        plain.no_truncation()
        ends = self._ends or [token for token in (tokenizer.eos_token_id,) if token is not None]
        try:
            built: llguidance.LLTokenizer = library.LLTokenizer(
                plain.to_str(), n_vocab=self._vocab_size, eos_token=ends or None
            )
        except ValueError as error:
            raise ConfigError(f"structured output cannot work with this model's tokenizer: {error}") from error
        return built


def _grammar(library: Any, structured: StructuredOutput) -> str:
    """What llguidance reads."""
    matcher = library.LLMatcher
    if structured.json is not None:
        overrides: dict[str, Any] = {"whitespace_flexible": False}
        if structured.whitespace:
            overrides = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
        _check_multiples(json.loads(structured.schema))
        return str(matcher.grammar_from_json_schema(structured.schema, overrides=overrides))
    if structured.regex is not None:
        # \d is 0 to 9, as in JSON schemas, and not the digits of every script
        expression = library.regex_to_lark(structured.regex, "d")
        return str(matcher.grammar_from_lark(f"start: /{expression}/"))
    if structured.choice is not None:
        return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structured.choice))))
    assert structured.lark is not None
    for schema in _schemas_in(structured.lark):
        if isinstance(schema, dict):
            StructuredOutput(json=schema)  # the bounds of one that stands alone
        _check_multiples(schema)
    if not _GBNF.search(structured.lark):
        return str(matcher.grammar_from_lark(structured.lark))
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(matcher.grammar_from_lark(gbnf_to_lark(structured.lark)))
    except Exception as error:  # the converter raises whatever it meets
        raise ValueError(f"no GBNF: {error}") from None


def _schemas_in(lark: str) -> Iterator[Any]:
    """The JSON schemas that a grammar names; llguidance says what is wrong with those that are none."""
    for found in re.finditer(r"%json\s*", lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]
        except RecursionError:
            raise ValueError("a schema in it is nested too deeply.") from None
        except ValueError:
            continue


def _name(structured: StructuredOutput) -> str:
    return f"StructuredOutput({structured.kind}=…)"


def _tidy(text: str) -> str:
    """llguidance's message, without its remark on verbosity, and not longer than a person reads."""
    text = text.replace("<non-verbose/>", "").strip()
    return text if len(text) <= 500 else text[:500] + "…"


def _check_multiples(schema: Any) -> None:
    """Refuse ``multipleOf`` whose automata multiply."""
    product = 1
    level = [schema]
    while level:
        one = level.pop()
        if isinstance(one, dict):
            level += one.values()
            step = one.get("multipleOf")
            if isinstance(step, (int, float)) and not isinstance(step, bool) and step > 0:
                exact = Fraction(str(step))
                product = lcm(product, exact.numerator * exact.denominator)
        elif isinstance(one, list):
            level += one
        if product > _MOST_MULTIPLES:
            raise ValueError(
                f"the values of multipleOf have the least common multiple {product}; allowed is {_MOST_MULTIPLES}."
            )
