"""A byte-level BPE tokenizer as GGUF metadata, and the proof that it is read back as the same tokenizer.

GGUF has no place for a normaliser: where a tokenizer composes letters and accents first (NFC, as Qwen's does), text that comes with
them apart is split in another way by every reader of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heretic.errors import UserError
from heretic.model.checkpoint import Checkpoint
from heretic.model.template import render

# What splits text before merging, by a piece that only this pattern has: the name that llama.cpp knows the pattern by.
SPLITS = (
    (r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+", "llama-bpe"),
    (r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+", "qwen2"),
)
PLAIN = "gpt-2"  # ByteLevel with its own pattern

# Letters with and without case, digits, spaces, line ends, signs, scripts: two tokenizers that split in different ways differ here.
PROBES = (
    "Hello, how's it going? I'LL see 12345 stars at 3.14159!",
    "  two  spaces\n\n\tand a tab\r\n  def f(x):\n        return x ** 2  # done\n",
    "Größe façade naïve 東京タワー मानक नदी עברית العربية 🌍🚀",
    "snake_case CamelCase kebab-case a/b\\c 100% $5.00 <tag> {json: [1, 2]} ...!!!",
    " ",
    "\n",
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges in order, the name of the splitting pattern, special ids, and the chat template."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str
    special: dict[str, int]
    adds_begin: bool
    template: str | Sequence[Mapping[str, str]] | None
    original: PreTrainedTokenizerBase

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Into the metadata of a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_begin)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, checkpoint: Checkpoint) -> Vocabulary:
    """What a tokenizer is made of; `rows` of the embedding that have no token get one that is never used. Raises UserError."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model, before = data.get("model") or {}, json.dumps(data.get("pre_tokenizer"), ensure_ascii=False)
    if model.get("type") != "BPE" or "ByteLevel" not in before:
        raise _unknown("its tokenizer is not byte-level BPE", checkpoint)
    known = {piece: name for piece, name in SPLITS if json.dumps(piece, ensure_ascii=False)[1:-1] in before}
    if not known and "Split" in before:
        raise _unknown("how its tokenizer splits text is not known here", checkpoint)
    added_tokens = data.get("added_tokens") or ()
    if max([*model["vocab"].values(), *(a["id"] for a in added_tokens)]) >= rows:
        raise _unknown("its tokenizer has tokens for which the model has no embedding", checkpoint)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(gguf.TokenType.UNUSED)] * rows
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for added in added_tokens:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ids = {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad", "unk")}
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    special = {n: int(number) for n, number in ids.items() if number is not None}
    return Vocabulary(tokens, types, merges, next(iter(known.values()), PLAIN), special, begins, template, tokenizer)


def check_same(written: Vocabulary, checkpoint: Checkpoint, path: Path) -> None:
    """Raise UserError where the file's tokenizer gives other ids than the original, which no comparison of logits would show."""
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*PROBES, "".join(t for t, kind in zip(written.tokens, written.types, strict=True) if kind == 3)[:2000]]
    if written.template:
        texts.append(render(written.original, [{"role": "user", "content": PROBES[0]}], {}))
    for text in texts:
        ours, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (written.original, read))
        if ours != theirs:
            raise _unknown(f"its tokenizer would split {text[:40]!r} in another way", checkpoint)


def _unknown(what: str, checkpoint: Checkpoint) -> UserError:
    return UserError(
        f"This model cannot be written as GGUF by heretic: {what}.",
        where=str(checkpoint.folder),
        fix="export the full model, then: python convert_hf_to_gguf.py FOLDER (it comes with llama.cpp)",
    )
