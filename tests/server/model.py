"""A tiny model with a tokenizer of one token per character, and an `AsyncLLM` of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from tests.support import GOLDEN

SETTINGS: dict[str, Any] = dict(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, progress=False)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if style %}({{ style }}) {% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)
#: What the model can write: its vocabulary has 131 tokens, and some of them no text.
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "—", "漢", "🙂"]


#: As models write it that were trained for tools.
HERMES_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} Call with <tool_call></tool_call>\n{% endif %}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function.name }}({{ call.function.arguments.city }})</tool_call>{% endfor %}\n{% endfor %}assistant:"
)


def save_tokenizer(folder: Path, template: str = TEMPLATE, *special: str) -> None:
    """Writes a tokenizer that fits the golden models."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS, *special]
    backend = tokenizers.Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in (*words[:4], *special)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_model(folder: Path) -> Path:
    """The golden Llama with that tokenizer, in a folder of its own."""
    made = folder / "tiny"
    shutil.copytree(GOLDEN / "llama", made)
    save_tokenizer(made)
    return made


def tool_model(folder: Path) -> Path:
    """The same with a template that knows tools, and room for them."""
    made = tiny_model(folder)
    save_tokenizer(made, HERMES_TEMPLATE)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return made
