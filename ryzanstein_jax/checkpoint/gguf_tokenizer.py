"""A tokenizer from a GGUF file's metadata.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) and leaves it to the reader to know what that does. What each
does is a row here, after the original `tokenizer.json` of the models. A name that has no row is refused: a near
miss gives wrong tokens without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ryzanstein_jax.checkpoint.gguf_metadata import read_gguf_metadata
from ryzanstein_jax.errors import UnsupportedModelError, WeightsError

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SYMBOLS}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges.

    `splits` are applied one after the other, each match a piece of its own; `digits` first makes each digit a
    piece; `whole_words` takes a piece that is in the vocabulary as it is, whatever the merges say;
    `add_bos` holds when the file does not say.
    """

    splits: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_ROWS: dict[tuple[str, ...], PreTokenizer] = {
    ("smollm", "starcoder", "refact", "command-r", "codeshell"): PreTokenizer((_GPT2,), digits=True),
    ("gpt-2", "phi-2", "olmo", "mpt", "exaone4"): PreTokenizer((_GPT2,)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3"): PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe"): PreTokenizer((_LLAMA3,)),
    ("qwen2", "megrez"): PreTokenizer((_QWEN2,), nfc=True),
    ("deepseek-r1-qwen", "stablelm2"): PreTokenizer((_QWEN2,)),
    ("qwen35",): PreTokenizer((_QWEN35,), nfc=True),
    ("tekken",): PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    ("gpt-4o", "llama4"): PreTokenizer((_GPT4O,)),
    ("default",): PreTokenizer(_DEFAULT),
}
#: `tokenizer.ggml.pre` -> what it does.
PRE_TOKENIZERS = {name: row for names, row in _ROWS.items() for name in names}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says about text.

    Attributes:
        tokenizer: adds BOS and EOS as the file wants when asked for special tokens.
        chat_templates: by name; the usual one is "default".
        special_tokens: "bos_token", "eos_token", "unk_token", "pad_token" -> text, where the file has one.
        add_bos: whether `tokenizer` writes a BOS.
        stop_token_ids: end of sequence, of turn and of message.
    """

    tokenizer: Tokenizer
    chat_templates: dict[str, str]
    special_tokens: dict[str, str]
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool
    stop_token_ids: tuple[int, ...]


def read_gguf_tokenizer(path: str | Path) -> GgufTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        UnsupportedModelError: a tokenizer model or pre-tokenizer that is not known here.
        WeightsError: missing, truncated or contradictory metadata.
    """
    try:
        return build_gguf_tokenizer(read_gguf_metadata(path))
    except WeightsError as error:
        if error.file is not None:
            raise
        raise WeightsError(str(error), file=path) from error


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """The same from metadata that was read already."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"tokenizer.ggml.model={kind!r} is not supported (gpt2 and llama are); give the tokenizer.json of the model"
        )
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise WeightsError("the vocabulary holds a token twice", found=f"{len(tokens) - len(set(tokens))} duplicates")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise WeightsError("one type per token is needed", expected=len(tokens), found=len(types))
    ids = {name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}

    try:
        if kind == "gpt2":
            pre = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
            tokenizer, add_bos = _byte_level(tokens, _texts(metadata, "tokenizer.ggml.merges"), pre), pre.add_bos
        else:
            tokenizer, add_bos = _sentencepiece(tokens, types, ids["unknown"], metadata), True
    except (WeightsError, UnsupportedModelError):
        raise
    except Exception as error:  # tokenizers raises bare Exception, for example for a merge of unknown tokens
        raise WeightsError(f"the vocabulary and the merges do not fit together: {error}") from error

    # Matched whole in the text, before anything else. Some files mark their end tokens as normal ones.
    ends = {ids[name] for name in ("bos", "eos", "eot", "eom")}
    special = [text for index, text in enumerate(tokens) if types[index] == _CONTROL or index in ends]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special if text])
    known = tokenizer.get_vocab()
    user = [text for index, text in enumerate(tokens) if types[index] == _USER_DEFINED and text in known]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in user if text])

    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and ids["bos"] is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and ids["eos"] is not None
    # Placeholders, because a token's text may hold what the template language reads as its own.
    around = [("<B>", ids["bos"] if add_bos else None), ("<E>", ids["eos"] if add_eos else None)]
    marks = {mark: index for mark, index in around if index is not None}
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in ("<B>", "$A", "<E>") if part == "$A" or part in marks),
            special_tokens=[{"id": mark, "ids": [i], "tokens": [tokens[i]]} for mark, i in marks.items()],
        )
    labels = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return GgufTokenizer(
        tokenizer=tokenizer,
        chat_templates=_chat_templates(metadata),
        special_tokens={label: tokens[i] for label, name in labels.items() if (i := ids[name]) is not None},
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        add_bos=add_bos,
        stop_token_ids=tuple(dict.fromkeys(i for n in ("eos", "eot", "eom") if (i := ids[n]) is not None)),
    )


def _pre_tokenizer(name: str | None) -> PreTokenizer:
    if name is None:
        warnings.warn(
            "the GGUF file names no pre-tokenizer (it was converted in early 2024 or before): llama.cpp's default is "
            "used, which may not be the model's; convert it again, or give the tokenizer.json of the model",
            stacklevel=4,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre={name!r} is not known (known: {', '.join(sorted(PRE_TOKENIZERS))}); "
            "give the tokenizer.json of the model"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: PreTokenizer) -> Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise WeightsError(
            "a merge is not two tokens with a space between", found=next(p for p in pairs if len(p) != 2)
        )
    vocabulary = {text: index for index, text in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.whole_words))  # type: ignore[arg-type]
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], unknown: int | None, metadata: Mapping[str, Any]
) -> Tokenizer:
    """SentencePiece's BPE: the adjacent pair whose union scores best is merged first."""
    scores = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise WeightsError("one score per token is needed", expected=len(tokens), found=len(scores))
    if str(metadata.get("general.architecture", "")).startswith("gemma"):
        # llama.cpp writes Gemma's runs of spaces as spaces, and its scores do not follow the order of the merges.
        tokens = ["▁" * len(text) if text and not text.strip(" ") else text for text in tokens]
        scores = [-float(index) for index in range(len(tokens))]
    vocabulary = {text: index for index, text in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise WeightsError("the vocabulary holds a token twice", found=len(tokens) - len(vocabulary))
    # Control, unknown and byte tokens are never the outcome of a merge, nor a part of one.
    mergeable = {t: i for t, i in vocabulary.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    ranked = []
    for text, index in mergeable.items():
        for cut in range(1, len(text)):
            left, right = mergeable.get(text[:cut]), mergeable.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, right))
    ranked.sort()
    merges = [(tokens[left], tokens[right]) for _, _, left, right in ranked]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise WeightsError(f"{key} is missing or no list of strings")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None or value == 0xFFFFFFFF:  # how some converters write "none"
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise WeightsError(f"tokenizer.ggml.{name}_token_id is no token", expected=f"0 to {count - 1}", found=value)
    return value


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` is the default one; `tokenizer.chat_template.NAME` are others."""
    prefix = "tokenizer.chat_template"
    found = {k: v for k, v in metadata.items() if isinstance(v, str) and (k == prefix or k.startswith(prefix + "."))}
    return {"default" if key == prefix else key[len(prefix) + 1 :]: text for key, text in found.items()}
