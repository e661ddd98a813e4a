"""Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop strings. No JAX here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from ryzanstein_jax.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from ryzanstein_jax.engine.chat_template import ChatTemplate
from ryzanstein_jax.errors import ConfigError, RequestError

MAX_TEXT_CHARACTERS = 8 << 20
_MAX_TOKENIZER_BYTES = 512 << 20
_MAX_CONFIG_BYTES = 16 << 20

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
#: Classes that obey add_bos_token and add_eos_token of tokenizer_config.json, whatever tokenizer.json says.
_OBEY_ADD_BOS = ("Llama", "CodeLlama", "Gemma", "Cohere")

#: UTF-8 spends up to four bytes on a character, so at most three tokens wait for the one that completes it.
_MAX_INCOMPLETE = 3
_WINDOW = 16
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a language model adds to it.

    Args:
        tokenizer: truncation and padding are switched off in it.
        chat_template: Jinja text, or texts by name ("default"; "tool_use" is taken when tools are given).
        bos_token, eos_token: their texts; templates see them.
        special_tokens: further ones for templates, such as "pad_token".
        stop_token_ids: tokens that end a completion; the end-of-sequence token when not given.
        max_text_length: characters in a text to encode.

    Raises:
        ConfigError: a token that is not in the vocabulary, or a template that does not compile.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        max_text_length: int = MAX_TEXT_CHARACTERS,
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.max_text_length = max_text_length
        self.special_tokens = dict(special_tokens or {})
        for name, text in (("bos_token", bos_token), ("eos_token", eos_token)):
            if text is not None:
                self.special_tokens[name] = text
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        ends = () if self.eos_token_id is None else (self.eos_token_id,)
        self.stop_token_ids = ends if stop_token_ids is None else tuple(stop_token_ids)
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size = max(tokenizer.get_vocab_size(with_added_tokens=True), 1 + max(added, default=-1))
        texts = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        self._templates = {name: ChatTemplate(text, name=f"chat_template[{name}]") for name, text in texts.items()}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face folder (or its `tokenizer.json`).

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja or .json.

        Raises:
            ConfigError: a file is missing, too large or malformed.
        """
        folder = Path(path)
        folder = folder.parent if folder.is_file() else folder
        main = Path(path) if Path(path).is_file() else folder / "tokenizer.json"
        if not main.is_file():
            raise ConfigError(
                "tokenizer",
                str(path),
                "it has no tokenizer.json; save one with transformers' AutoTokenizer, or name another",
            )
        _check_size(main, _MAX_TOKENIZER_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_file(str(main))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError("tokenizer", str(main), f"it is not a valid tokenizer.json: {error}") from error
        config = _json(folder / "tokenizer_config.json")
        known = {**_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
        special = {name: text for name in _SPECIAL if (text := _token_text(known.get(name))) is not None}
        special = {name: text for name, text in special.items() if backend.token_to_id(text) is not None}
        _obey_add_bos(backend, config, special)
        template = config.get("chat_template")
        legacy = folder / "chat_template.json"
        if legacy.is_file():
            template = _json(legacy).get("chat_template", template)
        if isinstance(template, list):
            template = {
                str(t["name"]): t["template"]
                for t in template
                if isinstance(t, dict) and {"name", "template"} <= t.keys()
            }
        file = folder / "chat_template.jinja"
        if file.is_file():
            _check_size(file, _MAX_CONFIG_BYTES)
            template = file.read_text(encoding="utf-8")
        if not isinstance(template, str | dict | None):
            raise ConfigError("chat_template", type(template).__name__, "use text, or a list of named texts")
        return cls(backend, chat_template=template, special_tokens=special)

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """From the metadata of a GGUF file; raises as `read_gguf_tokenizer` does."""
        found = read_gguf_tokenizer(path)
        return cls(
            found.tokenizer,
            chat_template=found.chat_templates,
            special_tokens=found.special_tokens,
            stop_token_ids=found.stop_token_ids,
        )

    @property
    def chat_template(self) -> str | None:
        """The text of the default template."""
        template = self._template(tools=False)
        return None if template is None else template.source

    @property
    def tool_template(self) -> str | None:
        """The text of the template that is taken when tools are given, if it reads them."""
        template = self._template(tools=True)
        return template.source if template is not None and "tools" in template.variables else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; `add_special_tokens` adds what the model wants around it, such as BOS.

        Raises:
            RequestError: no text, too long, or half of a surrogate pair in it, which no UTF-8 text holds.
        """
        if not isinstance(text, str):
            raise RequestError("prompt", text, "use text")
        if len(text) > self.max_text_length:
            raise RequestError("prompt", f"{len(text)} characters", f"use at most {self.max_text_length}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "prompt", ascii(text[error.start : error.end]), f"remove the lone surrogate at character {error.start}"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the tokens; bytes that are no UTF-8 come out as U+FFFD.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise RequestError("token_ids", index, f"use ids from 0 to {self.vocab_size - 1}")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None outside the vocabulary."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation, as text. `variables` are further ones that the template reads.

        Raises:
            RequestError: malformed messages, a variable that the template does not read, or messages it refuses.
        """
        template = self._template(tools=bool(tools))
        if template is None:
            raise RequestError("messages", "a chat", "this model has no chat template: send a plain prompt instead")
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            variables=variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. The template writes BOS where the model wants one, so none is added."""
        text = self.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
        return self.encode(text, add_special_tokens=False)

    def _template(self, *, tools: bool) -> ChatTemplate | None:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default") or next(iter(self._templates.values()), None)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        index = None if text is None else self.backend.token_to_id(text)
        if text is not None and index is None:
            raise ConfigError(name, text, "use a token of the vocabulary")
        return index


class IncrementalDetokenizer:
    """Text from tokens as they come, for the price of a few tokens each.

    `text` is what may be shown: it never shrinks (but for a stop string, which was held back anyway). Held back are
    a character whose bytes have not all come, and a tail that may turn out to begin a stop string. The stop
    string that is complete first ends the text, however it is spread over tokens; of those that end
    at the same place the longest.

    The text is the tokenizer's `decode` of all tokens; with byte-fallback (SentencePiece) vocabularies that holds
    for tokens that make valid UTF-8.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the last tokens: context for spaces and incomplete characters
        self._context = 0  # tokens of the window whose text was settled when it was last cut
        self._sent = 0  # characters of the window's text that are in _text or _held
        self._stops = [_StopMatcher(text) for text in ([stop] if isinstance(stop, str) else stop) if text]
        self._include_stop = include_stop_str_in_output
        self._held = ""  # begins a stop string, perhaps
        self._text = ""
        self._closed = False

    @property
    def text(self) -> str:
        """All the text that is safe to show."""
        return self._text

    def append(self, token_ids: Sequence[int], *, check_stop: bool = True) -> str | None:
        """Take the next tokens; returns the stop string that they completed, after which all else is ignored.

        `check_stop=False` lets stop strings pass that begin in these tokens (or before), as `min_tokens` wants it.
        """
        for token_id in token_ids:
            if self._closed:
                break
            if token_id not in self._skipped and 0 <= token_id < self._tokenizer.vocab_size:
                found = self._take(self._settle(token_id), check_stop)
                if found is not None:
                    return found
        return None

    def finish(self) -> str | None:
        """No more tokens come: release what was held back. Returns a stop string if that completed it."""
        if self._closed:
            return None
        rest = self._tokenizer.backend.decode(self._window, skip_special_tokens=False)[self._sent :]
        found = self._take(rest, True)
        if found is None:
            self._text, self._held = self._text + self._held, ""
            self._closed = True
        return found

    def _settle(self, token_id: int) -> str:
        """The text that this token settles; less or more than its own."""
        decode = self._tokenizer.backend.decode
        self._window.append(token_id)
        text = decode(self._window, skip_special_tokens=False)
        complete = text.rstrip(_REPLACEMENT)
        if len(complete) == len(text):
            settled, unsettled = text[self._sent :], 0
            # The last settled tokens stay, because a decoder may treat the first token of a text in its own way.
            self._window = self._window[self._context :]
            self._context = len(self._window)
        elif len(self._window) < _WINDOW:
            # Nothing is settled: a byte-fallback decoder gives one U+FFFD for every byte of a run, good ones too.
            return ""
        else:
            # So many bytes make no character: all but the last few are settled as they are.
            unsettled = min(len(text) - len(complete), _MAX_INCOMPLETE)
            settled = text[self._sent : len(text) - unsettled]
            self._window, self._context = self._window[-_WINDOW // 2 :], 0
        self._sent = len(decode(self._window, skip_special_tokens=False)) - unsettled
        return settled

    def _take(self, chunk: str, check_stop: bool) -> str | None:
        """Move text on to what may be shown; returns the stop string that ended it."""
        if not check_stop:
            for matcher in self._stops:
                matcher.matched = 0
            self._text, self._held = self._text + self._held + chunk, ""
            return None
        if not self._stops:
            self._text += chunk
            return None
        for at, character in enumerate(chunk, 1):
            complete = [matcher.text for matcher in self._stops if matcher.feed(character)]
            if complete:
                found = max(complete, key=len)
                text = self._text + self._held + chunk[:at]
                self._text = text if self._include_stop else text[: len(text) - len(found)]
                self._held, self._closed = "", True
                return found
        pending = self._held + chunk
        kept = max(matcher.matched for matcher in self._stops)
        self._text += pending[: len(pending) - kept]
        self._held = pending[len(pending) - kept :]
        return None


class _StopMatcher:
    """Knuth, Morris and Pratt: how many characters at the end of what was fed begin the text, in constant time each."""

    def __init__(self, text: str):
        self.text, self.matched = text, 0
        self._fall = [0]
        for character in text[1:]:
            self._fall.append(self._next(self._fall[-1], character))

    def feed(self, character: str) -> bool:
        """Whether this character completes the text."""
        self.matched = self._next(self.matched, character)
        return self.matched == len(self.text)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._fall[matched - 1]
        return matched + (self.text[matched] == character)


def _obey_add_bos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Some tokenizer classes add BOS and EOS by tokenizer_config.json alone; do as they do."""
    name = str(config.get("tokenizer_class", ""))
    if not name.startswith(_OBEY_ADD_BOS) or not {"add_bos_token", "add_eos_token"} & config.keys():
        return
    parts, wanted = ["$A"], []
    if config.get("add_bos_token", True) and "bos_token" in special:
        parts.insert(0, "<B>")
        wanted.append(("<B>", special["bos_token"]))
    if config.get("add_eos_token", False) and "eos_token" in special:
        parts.append("<E>")
        wanted.append(("<E>", special["eos_token"]))
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(parts),
        special_tokens=[{"id": mark, "ids": [backend.token_to_id(text)], "tokens": [text]} for mark, text in wanted],
    )


def _token_text(value: object) -> str | None:
    """A token in a configuration: text, or an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise ConfigError("tokenizer", str(path), f"the file has more than {limit >> 20} MiB")


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    _check_size(path, _MAX_CONFIG_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError("tokenizer", str(path), f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("tokenizer", str(path), "it has to hold a JSON object")
    return value
