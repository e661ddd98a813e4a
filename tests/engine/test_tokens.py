"""The tokenizer's edges: what it refuses, special tokens, folders, and the incremental detokenizer."""

import json
import subprocess
import sys
import time

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ryzanstein_jax.engine.tokens import IncrementalDetokenizer, Tokenizer
from ryzanstein_jax.errors import ConfigError, RequestError

TEXTS = [
    "Hello, world! It's 2024-05-06 and 3.14159 > 22/7.",
    "def f(x):\n\treturn  x**2   # squared\n\n\n    pass",
    "naïve café — 東京タワー 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 and a lone � replacement",
    "   leading and trailing   ",
    "",
]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return Tokenizer.from_gguf(smollm2_path)


@pytest.fixture(scope="module")
def byte_fallback():
    """A small SentencePiece-like tokenizer: spaces as ▁, a prefix space, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁a", "b"), ("a", "b"), ("▁", "a"), ("▁", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>")


def stream(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    shown = ""
    for token_id in ids:
        found = detokenizer.append([token_id])
        assert detokenizer.text.startswith(shown), "text that was shown was taken back"
        shown = detokenizer.text
        if found is not None:
            return found, detokenizer.text
    found = detokenizer.finish()
    assert detokenizer.text.startswith(shown)
    return found, detokenizer.text


def test_no_jax_is_imported():
    code = "import sys, ryzanstein_jax.engine.tokens; sys.exit(bool({'jax', 'jaxlib', 'flax'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_inverse(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


def test_special_tokens(smollm2):
    ids = smollm2.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2) == (smollm2.bos_token_id, smollm2.eos_token_id)
    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"
    assert smollm2.id_to_token(2) == "<|im_end|>"
    assert smollm2.id_to_token(49152) is None
    assert smollm2.id_to_token(-1) is None
    assert smollm2.vocab_size == 49152
    assert smollm2.stop_token_ids == (2,)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", 7, None, b"bytes"])
def test_encode_refuses_what_is_no_text(smollm2, text):
    with pytest.raises(RequestError, match="prompt="):
        smollm2.encode(text)


def test_text_length_is_bounded(smollm2):
    small = Tokenizer(smollm2.backend, max_text_length=10)
    assert small.encode("0123456789")
    with pytest.raises(RequestError, match="at most 10"):
        small.encode("0123456789a")


def test_nul_is_encoded(smollm2):
    assert smollm2.decode(smollm2.encode("a\tb")) == "a\tb"
    assert isinstance(smollm2.encode("a\0b"), list)


@pytest.mark.parametrize("ids", [[-1], [49152], [2**40]])
def test_decode_refuses_ids_outside_the_vocabulary(smollm2, ids):
    with pytest.raises(RequestError, match="token_ids="):
        smollm2.decode(ids)


def test_truncation_and_padding_of_the_file_are_switched_off():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend).encode("a a a")) == 3


def test_a_special_token_outside_the_vocabulary_is_refused(smollm2):
    with pytest.raises(ConfigError, match="eos_token='<nope>'"):
        Tokenizer(smollm2.backend, eos_token="<nope>")


class TestFromFolder:
    @pytest.fixture
    def folder(self, tmp_path, byte_fallback):
        byte_fallback.backend.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def write(self, folder, name, value):
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")

    def test_special_tokens_and_template(self, folder):
        self.write(folder, "special_tokens_map.json", {"bos_token": "a", "eos_token": {"content": "</s>"}})
        self.write(folder, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "chat_template": "old"})
        self.write(folder, "chat_template.jinja", "{{ bos_token }}new")
        tokenizer = Tokenizer.from_folder(folder)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.chat_template == "{{ bos_token }}new"
        assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "<s>new"

    def test_named_templates(self, folder):
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        self.write(folder, "tokenizer_config.json", {"chat_template": named})
        tokenizer = Tokenizer.from_folder(folder / "tokenizer.json")
        chat = [{"role": "user", "content": "x"}]
        assert tokenizer.apply_chat_template(chat) == "plain"
        assert tokenizer.apply_chat_template(chat, tools=[{"type": "function"}]) == "tools"

    @pytest.mark.parametrize(("flags", "ids"), [({"add_bos_token": True}, [1, 262]), ({"add_bos_token": False}, [262])])
    def test_add_bos_token_is_obeyed_where_the_class_obeys_it(self, folder, flags, ids):
        base = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        self.write(folder, "tokenizer_config.json", base | flags)
        assert Tokenizer.from_folder(folder).encode("a") == ids

    def test_a_chat_has_one_bos(self, folder):
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}
        self.write(
            folder, "tokenizer_config.json", config | {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
        )
        tokenizer = Tokenizer.from_folder(folder)
        chat = [{"role": "user", "content": "ab"}]
        assert tokenizer.encode(tokenizer.apply_chat_template(chat)).count(1) == 2, "the trap"
        assert tokenizer.encode_chat(chat).count(1) == 1

    def test_missing_and_broken_files(self, folder, tmp_path_factory):
        with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
            Tokenizer.from_folder(tmp_path_factory.mktemp("empty"))
        self.write(folder, "tokenizer_config.json", "{")
        with pytest.raises(ConfigError, match="no JSON"):
            Tokenizer.from_folder(folder)
        self.write(folder, "tokenizer_config.json", "[1]")
        with pytest.raises(ConfigError, match="JSON object"):
            Tokenizer.from_folder(folder)
        self.write(folder, "tokenizer.json", "{}")
        with pytest.raises(ConfigError, match=r"not a valid tokenizer\.json"):
            Tokenizer.from_folder(folder)


class TestStream:
    @QUICK
    @given(ids=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
    def test_equals_decode_for_any_tokens(self, smollm2, ids, skip):
        assert stream(smollm2, ids, skip_special_tokens=skip) == (None, smollm2.decode(ids, skip))

    @QUICK
    @given(ids=st.lists(st.integers(0, 272), max_size=120), skip=st.booleans())
    def test_equals_decode_for_broken_utf8(self, smollm2, ids, skip):
        # The first tokens are the special ones and single bytes, most of which begin or continue a character.
        assert stream(smollm2, ids, skip_special_tokens=skip) == (None, smollm2.decode(ids, skip))

    @QUICK
    @given(text=st.text(max_size=60), cut=st.integers(1, 5))
    def test_unicode(self, smollm2, text, cut):
        ids = smollm2.encode(text)
        detokenizer = IncrementalDetokenizer(smollm2)
        for at in range(0, len(ids), cut):
            detokenizer.append(ids[at : at + cut])
            # What is shown is settled: no half characters, unless the text itself holds U+FFFD.
            assert smollm2.decode(ids).startswith(detokenizer.text)
        detokenizer.finish()
        assert detokenizer.text == smollm2.decode(ids)

    @QUICK
    @given(text=st.text(alphabet=" ab\n東é👩", max_size=40))
    def test_byte_fallback_and_prefix_space(self, byte_fallback, text):
        ids = byte_fallback.encode(text)
        assert stream(byte_fallback, ids) == (None, byte_fallback.decode(ids))
        assert byte_fallback.decode(ids) == text

    @QUICK
    @given(
        ids=st.lists(st.integers(17, 400), max_size=50),
        stops=st.lists(st.text(alphabet="aeist \n", min_size=1, max_size=3), min_size=1, max_size=4),
        include=st.booleans(),
    )
    def test_stop_strings_as_if_text_came_by_character(self, smollm2, ids, stops, include):
        text = smollm2.decode(ids)
        ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
        found, shown = stream(smollm2, ids, stop=stops, include_stop_str_in_output=include)
        if not ends:
            assert (found, shown) == (None, text)
        else:
            end, _, stop = min(ends)
            assert (found, shown) == (stop, text[: end if include else end - len(stop)])

    def test_a_stop_string_split_over_tokens_never_shows(self, smollm2):
        ids = smollm2.encode("one\n\nObservation: two")
        detokenizer = IncrementalDetokenizer(smollm2, stop=["\n\nObservation:"])
        found = None
        for token_id in ids:
            found = detokenizer.append([token_id])
            assert "\n" not in detokenizer.text
            if found:
                break
        assert found == "\n\nObservation:"
        assert detokenizer.text == "one"
        assert detokenizer.append(ids) is None
        assert detokenizer.finish() is None
        assert detokenizer.text == "one"

    def test_a_false_alarm_is_released(self, smollm2):
        assert stream(smollm2, smollm2.encode("ab ab ac"), stop=["ab ad", "acd"]) == (None, "ab ab ac")

    def test_min_tokens_lets_stop_strings_pass(self, smollm2):
        first, second = smollm2.encode("end of"), smollm2.encode(" the end.")
        detokenizer = IncrementalDetokenizer(smollm2, stop=["end"])
        assert detokenizer.append(first, check_stop=False) is None
        assert detokenizer.text == "end of"
        assert detokenizer.append(second) == "end"
        assert detokenizer.text == "end of the "

    def test_the_tail_can_complete_a_stop_string(self, smollm2):
        half = smollm2.encode("é")[:1] if len(smollm2.encode("é")) > 1 else smollm2.encode("👩")[:1]
        assert stream(smollm2, half, stop=["\ufffd"]) == ("\ufffd", "")

    def test_ids_that_the_vocabulary_lacks_say_nothing(self, smollm2):
        assert stream(smollm2, [60000, -1, *smollm2.encode("x")]) == (None, "x")

    @pytest.mark.parametrize("token", ["Ġthe", "Ģ"])
    def test_cost_is_linear(self, smollm2, token):
        token_id = smollm2.backend.token_to_id(token)  # a word; and a byte that no character begins with
        times = []
        for count in (2000, 8000):
            best = float("inf")
            for _ in range(3):
                start = time.thread_time()
                detokenizer = IncrementalDetokenizer(smollm2, stop=["zzz"])
                for _ in range(count):
                    detokenizer.append([token_id])
                best = min(best, time.thread_time() - start)
            times.append(best)
        assert times[1] < 9 * times[0], f"four times the tokens took {times[1] / times[0]:.0f} times as long"


def test_template_processing_is_kept(byte_fallback):
    backend = tokenizers.Tokenizer.from_str(byte_fallback.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a") == [1, 262]
    assert tokenizer.encode("a", add_special_tokens=False) == [262]
