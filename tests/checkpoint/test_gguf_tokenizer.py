"""The tokenizer of a GGUF against one built from the same vocabulary with the original pre-tokenizer."""

import itertools
import struct

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from ryzanstein_jax.checkpoint.gguf_metadata import read_gguf_metadata
from ryzanstein_jax.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, build_gguf_tokenizer, read_gguf_tokenizer
from ryzanstein_jax.errors import UnsupportedModelError, WeightsError

TEXTS = [
    "The year 2024 had 366 days; 1234567890 is ten digits, 3.14159 is not. x2y3z ٣٤٥ ½ Ⅷ ²³",
    'def fib(n: int) -> int:\n    """Doc."""\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\n',
    "for (let i=0;i<100;i++){\n\t\tconsole.log(`${i}`);\t// tabs\r\n}\r\n",
    "It's we're they'll I'VE 'tis o'clock don't",
    "   leading,  double   triple    four     and trailing     ",
    "\n\n\n \n \t\n",
    "東京は日本の首都です。北京有2154万人口。서울은 1000만 도시",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é é ﷺ café naïve Übergröße Ωμέγα Привет שלום हिन्दी",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|><|im_start|> <|im_sta",
    "https://example.org/a?b=c&d=%20#e foo_bar fooBar FOO_BAR __init__ @#$%^&*()",
]


@pytest.fixture(scope="module")
def metadata(smollm2_path):
    return read_gguf_metadata(smollm2_path)


@pytest.fixture(scope="module")
def found(metadata):
    return build_gguf_tokenizer(metadata)


@pytest.fixture(scope="module")
def original(metadata):
    """SmolLM2's own tokenizer.json, built by hand."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({text: index for index, text in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens[:17]])
    return tokenizer


class TestSmolLM2:
    @pytest.mark.parametrize("text", TEXTS)
    def test_real_texts(self, found, original, text):
        assert found.tokenizer.encode(text).ids == original.encode(text).ids

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(max_size=40) | st.text(alphabet="a1 2\n\t'sé東½<|>", max_size=40))
    def test_any_text(self, found, original, text):
        assert found.tokenizer.encode(text).ids == original.encode(text).ids

    def test_each_digit_is_a_token(self, found):
        assert found.tokenizer.encode("x 2024").tokens == ["x", "Ġ", "2", "0", "2", "4"]

    def test_what_the_file_says(self, found):
        assert found.special_tokens["bos_token"] == "<|im_start|>"
        assert (found.bos_token_id, found.eos_token_id, found.stop_token_ids) == (1, 2, (2,))
        assert not found.add_bos
        assert found.chat_templates.keys() == {"default"}
        assert "add_generation_prompt" in found.chat_templates["default"]
        assert found.tokenizer.get_vocab_size() == 49152
        assert found.tokenizer.encode("a").ids == found.tokenizer.encode("a", add_special_tokens=False).ids


def byte_level(pre, **more):
    """Metadata of a vocabulary that holds the 256 bytes, two special tokens, one user-defined and one merge."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "<|begin|>", "<tool>", "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 4, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.bos_token_id": 257,
    } | more


def pieces(pre, text):
    """How a pre-tokenizer cuts a text."""
    tokenizer = build_gguf_tokenizer(byte_level(pre)).tokenizer
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [span for _, span in cut][-1][1] == len(text)
    return [text[begin:end] for _, (begin, end) in cut]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " X", "'", "S", "?!", "\n\n"]),
        ("gpt-2", ["It", "'s", " 12345", " X", "'", "S", "?!", "\n\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " X", "'S", "?!\n\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " X", "'S", "?!\n\n"]),
        ("gpt-4o", ["It's", " ", "123", "45", " X'S", "?!\n\n"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " X", "'S", "?!\n\n"]),
        ("default", ["It", "'", "s", " ", "123", "45", " X", "'", "S", "?!", "\n\n"]),
    ],
)
def test_how_each_pre_tokenizer_cuts(pre, expected):
    text = "It's 12345 X'S?!\n\n"
    assert pieces(pre, text) == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loses_nothing(pre):
    tokenizer = build_gguf_tokenizer(byte_level(pre)).tokenizer
    for text in TEXTS:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_and_user_defined_tokens_stay_whole():
    built = build_gguf_tokenizer(byte_level("gpt-2", **{"tokenizer.ggml.eot_token_id": 257}))
    assert built.tokenizer.encode("x<|end|><tool>").ids[1:] == [256, 258]
    assert built.tokenizer.decode([256, 258]) == "<tool>"
    assert built.stop_token_ids == (256, 257)


def test_an_end_token_of_normal_type_is_special_all_the_same():
    metadata = byte_level("gpt-2", **{"tokenizer.ggml.token_type": [1] * 260})
    assert build_gguf_tokenizer(metadata).tokenizer.encode("<|end|>").ids == [256]


@pytest.mark.parametrize(
    ("pre", "more", "around"),
    [
        ("gpt-2", {}, ([], [])),
        ("llama-bpe", {}, ([257], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ([257], [256])),
    ],
)
def test_begin_and_end_of_sequence(pre, more, around):
    built = build_gguf_tokenizer(byte_level(pre, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}))
    plain = built.tokenizer.encode("x", add_special_tokens=False).ids
    assert built.tokenizer.encode("x").ids == [*around[0], *plain, *around[1]]
    assert built.add_bos == bool(around[0])


def sentencepiece(**more):
    words = {"▁": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "bc": -5.0, "ab": -6.0, "▁a": -7.0, "▁abc": -20.0, "abc": -9.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | more


def by_score(metadata, text):
    """SentencePiece's rule, spelled out: join the neighbours whose union scores best, the leftmost of equals."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not unions:
            return parts
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


class TestSentencePiece:
    @settings(max_examples=100, deadline=None)
    @given(text=st.text(alphabet="abc ", min_size=1, max_size=20))
    def test_merges_follow_the_scores(self, text):
        metadata = sentencepiece()
        tokenizer = build_gguf_tokenizer(metadata).tokenizer
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert encoding.tokens == by_score(metadata, text)
        assert tokenizer.decode(encoding.ids) == text

    def test_bos_bytes_and_unknown_characters(self):
        built = build_gguf_tokenizer(sentencepiece())
        assert built.add_bos
        assert built.tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
        assert built.tokenizer.decode(built.tokenizer.encode(" é\n東").ids) == " é\n東"
        # The text of a byte token is text, and never becomes the byte.
        assert built.tokenizer.decode(built.tokenizer.encode("<0x0A>").ids) == "<0x0A>"

    def test_without_prefix_space(self):
        built = build_gguf_tokenizer(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
        assert built.tokenizer.encode("a").tokens == ["<s>", "a"]
        assert built.tokenizer.decode(built.tokenizer.encode(" a").ids) == " a"

    def test_gemma_merges_in_the_order_of_the_vocabulary(self):
        # By score "▁a" is worse than all others; by place it comes before "abc".
        metadata = sentencepiece(**{"general.architecture": "gemma2", "tokenizer.ggml.add_space_prefix": False})
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "  "]
        metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.tokens"])
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
        tokenizer = build_gguf_tokenizer(metadata).tokenizer
        assert tokenizer.encode("a  b", add_special_tokens=False).tokens == ["a", "▁▁", "b"]

    def test_scores_are_needed(self):
        with pytest.raises(WeightsError, match="score per token"):
            build_gguf_tokenizer(sentencepiece(**{"tokenizer.ggml.scores": [0.0]}))


class TestRefusals:
    def test_an_unknown_pre_tokenizer_is_named(self):
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre='new-thing'"):
            build_gguf_tokenizer(byte_level("new-thing"))

    def test_a_missing_pre_tokenizer_warns(self):
        with pytest.warns(UserWarning, match="names no pre-tokenizer"):
            build_gguf_tokenizer(byte_level(None))

    @pytest.mark.parametrize("kind", ["bert", "t5", None])
    def test_an_unknown_model_is_named(self, kind):
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.model="):
            build_gguf_tokenizer(byte_level("gpt-2", **{"tokenizer.ggml.model": kind}))

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("tokens", None, "missing"),
            ("tokens", ["a", "a"], "twice"),
            ("token_type", [1], "type per token"),
            ("merges", ["a"], "a merge is not two tokens"),
            ("merges", ["a nothere"], "do not fit"),
            ("eos_token_id", 10**6, "no token"),
        ],
    )
    def test_contradictory_metadata(self, key, value, match):
        with pytest.raises(WeightsError, match=match):
            build_gguf_tokenizer(byte_level("gpt-2", **{f"tokenizer.ggml.{key}": value}))


def text_bytes(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(*pairs, version=3, count=None):
    body = b"".join(text_bytes(key) + value for key, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs) if count is None else count) + body


class TestMetadata:
    def write(self, tmp_path, data):
        (tmp_path / "x.gguf").write_bytes(data)
        return tmp_path / "x.gguf"

    def test_values(self, tmp_path):
        data = gguf(
            ("int", struct.pack("<Ii", 5, -7)),
            ("float", struct.pack("<If", 6, 0.5)),
            ("bool", struct.pack("<I?", 7, True)),
            ("text", struct.pack("<I", 8) + text_bytes("é")),
            ("list", struct.pack("<IIQ3q", 9, 11, 3, 1, -2, 3)),
            ("texts", struct.pack("<IIQ", 9, 8, 2) + text_bytes("a") + text_bytes("")),
        )
        expected = {"int": -7, "float": 0.5, "bool": True, "text": "é", "list": [1, -2, 3], "texts": ["a", ""]}
        assert read_gguf_metadata(self.write(tmp_path, data)) == expected

    def test_truncated_anywhere(self, tmp_path):
        data = gguf(("texts", struct.pack("<IIQ", 9, 8, 2) + text_bytes("a") + text_bytes("bc")))
        for size in range(len(data)):
            with pytest.raises(WeightsError):
                read_gguf_metadata(self.write(tmp_path, data[:size]))

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"nope" * 9, "not a GGUF"),
            (gguf(version=1), "version"),
            (gguf(count=1 << 40), "too many"),
            (gguf(("k", struct.pack("<I", 99))), "unknown type"),
            (gguf(("k", struct.pack("<IIQ", 9, 8, 1 << 60))), "longer than the file"),
            (gguf(("k", struct.pack("<IIQ", 9, 9, 0))), "unknown type"),
            (gguf(("k", struct.pack("<IQ", 8, 1 << 40))), "too long"),
            (gguf(("k", struct.pack("<IQ", 8, 1) + b"\xff")), "not UTF-8"),
        ],
    )
    def test_hostile_files(self, tmp_path, data, match):
        with pytest.raises(WeightsError, match=match):
            read_gguf_metadata(self.write(tmp_path, data))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(WeightsError, match=r"none\.gguf"):
            read_gguf_tokenizer(tmp_path / "none.gguf")

    def test_a_file_without_a_tokenizer_is_named(self, tmp_path):
        data = gguf(("tokenizer.ggml.model", struct.pack("<I", 8) + text_bytes("gpt2")))
        with pytest.raises(WeightsError, match=r"x\.gguf"):
            read_gguf_tokenizer(self.write(tmp_path, data))
