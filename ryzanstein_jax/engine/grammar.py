"""Grammars that completions must follow, by the llguidance library. No JAX here.

A `Grammar` is compiled once and kept; each completion walks it with a `Matcher` of its own, which lives with its
`Sequence` and so outlives the devices. Whoever sends a grammar may mean harm: its size, the work to compile it and the
work of each step are bounded, and one that reaches a bound ends its own request only.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.errors import RequestError
from ryzanstein_jax.structured_outputs import StructuredOutputsParams

_FIELD = "structured_outputs"
_KEPT = 64  # compiled grammars; clients send the same few again and again
_SHOWN = 300  # characters of what llguidance says
_MAX_GBNF = 8 << 10  # characters; llguidance converts it in Python, in a time that grows with their square

#: Fuel is llguidance's measure of work: about 50,000 a millisecond while compiling, 14,000 in a step. A lexer state
#: takes 1 to 2 kB.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
#: Not without end: a model that is lost in line ends would go on to its limit.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"


class Matcher:
    """Where one completion stands in its grammar."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Whether the completion is whole and nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Takes the next token.

        Raises:
            RequestError: the grammar does not allow it, or became too complex at this place.
        """
        if not self._matcher.consume_token(token):
            raise _refusal(self._matcher)

    def mask(self, banned: Sequence[int] = ()) -> np.ndarray:
        """Which tokens may come next: uint32 [words], bit t % 32 of word t // 32 for token t.

        Args:
            banned: tokens that may not, unless there are no others.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if banned:
            without = words.copy()
            for token in banned:
                without[token // 32] &= ~np.uint32(1 << token % 32)
            if without.any():
                return without
        return words


class Grammar:
    """A compiled grammar."""

    def __init__(self, start: LLMatcher):
        self._start = start

    def matcher(self) -> Matcher:
        """At the beginning of a completion."""
        return Matcher(self._start.deep_copy())


class Grammars:
    """Compiles grammars for one model, and keeps the last ones. Several threads may call it.

    Args:
        tokenizer: the model's.
        vocab_size: of the model.
        eos_token_ids: what ends a completion, where the grammar allows the end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._eos_token_ids = tokenizer, list(eos_token_ids)
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar; takes from a microsecond to a second, mostly without Python's lock.

        Raises:
            RequestError: it is malformed, too complex, allows no completion at all, or the tokenizer is of a kind that
                llguidance can't read.
        """
        text = _text(wanted)
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
            tokenizer = self._llguidance_tokenizer()
        start = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
        _try_out(start.deep_copy())
        grammar = Grammar(start)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _llguidance_tokenizer(self) -> LLTokenizer:
        """Made when the first grammar comes: that takes a quarter of a second for 50,000 tokens."""
        if self._made is None:
            ends = self._eos_token_ids or None
            try:
                self._made = LLTokenizer(self._tokenizer.backend.to_str(), n_vocab=self._vocab_size, eos_token=ends)
            except ValueError as error:
                remedy = f"llguidance can't read this model's tokenizer ({str(error)[:_SHOWN]}): leave it out"
                raise RequestError(_FIELD, "a grammar", remedy) from error
        return self._made


def _text(wanted: StructuredOutputsParams) -> str:
    """What llguidance compiles.

    Raises:
        RequestError: GBNF that can't be converted, or a schema of too many levels.
    """
    try:
        return _converted(wanted)
    except Exception as error:  # the converters raise what Python does
        remedy = f"it can't be read: {str(error)[:_SHOWN]}"
        raise RequestError(f"{_FIELD}.{wanted.kind}", getattr(wanted, wanted.kind), remedy) from error


def _converted(wanted: StructuredOutputsParams) -> str:
    if wanted.grammar is not None:
        if "::=" in wanted.grammar and len(wanted.grammar) > _MAX_GBNF:
            raise ValueError(f"GBNF of more than {_MAX_GBNF} characters")
        return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        # One terminal: as alternatives of a rule, many choices would reach a bound of the parser.
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    schema = str(wanted.json) if wanted.json is not None else '{"type": "object"}'
    compact = wanted.disable_any_whitespace
    return LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
    )


def _try_out(matcher: LLMatcher) -> None:
    """Takes a first step, because that is where grammars fail that allow nothing, or too much.

    Raises:
        RequestError: it fails.
    """
    if matcher.is_error():
        raise _refusal(matcher)
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
    if len(allowed):
        matcher.consume_token(int(allowed[0]))
        if not matcher.is_error():
            matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(matcher)


def _refusal(matcher: LLMatcher) -> RequestError:
    """What llguidance says, without its own state and traces."""
    said = matcher.get_error() or "no token is allowed"
    if said.startswith("NoExtension"):
        said = "nothing that can be written satisfies it"
    if said.startswith("panic"):  # its own bounds, checked late
        said = "it is too large"
    for rest in ("<backtrace>", "<state>", "<non-verbose/>"):
        said = said.partition(rest)[0]
    return RequestError(_FIELD, "a grammar", f"it is malformed or too complex: {' '.join(said.split())[:_SHOWN]}")
