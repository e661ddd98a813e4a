"""Log-probabilities as the two endpoints word them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers

from ryzanstein_jax.engine.tokens import Tokenizer
from ryzanstein_jax.request import Logprob, TokenLogprobs

#: What the API writes for minus infinity, which JSON has not.
_LEAST = -9999.0
_REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies spell each byte: those that print as themselves, the others from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printed}
    hidden = [byte for byte in range(256) if byte not in set(printed)]
    spelled |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    assert set(spelled) == set(pre_tokenizers.ByteLevel.alphabet())
    return spelled


_BYTES = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token_id: int, text: str) -> bytes:
    """The bytes of a token, also where they are only part of a character and `text` can't show them."""
    if _REPLACEMENT in text:
        spelled = tokenizer.id_to_token(token_id) or ""
        if spelled.startswith("<0x") and spelled.endswith(">") and len(spelled) == 6:
            return bytes.fromhex(spelled[3:5])
        if spelled and all(character in _BYTES for character in spelled):
            return bytes(_BYTES[character] for character in spelled)
    return text.encode()


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST)


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[TokenLogprobs], top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: the tokens chosen, each with the likeliest others."""

    def one(token: int, entry: Logprob) -> dict[str, Any]:
        text = _text(entry)
        return {"token": text, "logprob": _value(entry), "bytes": list(token_bytes(tokenizer, token, text))}

    content = []
    for token, entry in zip(tokens, entries, strict=True):
        likeliest = _likeliest(entry, top)
        content.append({**one(token, entry[token]), "top_logprobs": [one(other, entry[other]) for other in likeliest]})
    return {"content": content, "refusal": None}


def _likeliest(entry: TokenLogprobs, top: int) -> list[int]:
    """The `top` likeliest tokens; the chosen one is among them only where it belongs there."""
    ranked = sorted(entry, key=lambda token: entry[token].rank or 0)
    return [token for token in ranked if (entry[token].rank or 0) <= top][:top]


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, which names the place of each token in the text.

    Args:
        top: alternatives of each token; the chosen one comes on top of them.
        offset: where the text begins.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int):
        self._tokenizer, self._top, self._offset = tokenizer, top, offset

    def add(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of the tokens that follow; None is the first token of a prompt, which nothing comes before."""
        texts, values, offsets = [], [], []
        tops: list[dict[str, float] | None] = []
        for token, entry in zip(tokens, entries, strict=True):
            chosen = entry[token] if entry is not None else Logprob(0.0, None, self._tokenizer.decode([token], False))
            offsets.append(self._offset)
            texts.append(self._shown(token, chosen))
            self._offset += len(_text(chosen))
            values.append(None if entry is None else _value(chosen))
            if entry is None:
                tops.append(None)
            else:
                named = dict.fromkeys([*_likeliest(entry, self._top), token])
                tops.append({self._shown(other, entry[other]): _value(entry[other]) for other in named})
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _shown(self, token: int, entry: Logprob) -> str:
        """Part of a character is written as its bytes, so that two of them don't look the same."""
        text = _text(entry)
        raw = token_bytes(self._tokenizer, token, text)
        if _REPLACEMENT in text and raw != text.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text
