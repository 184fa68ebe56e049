"""The token that a chat template puts after an answer, for models whose `eos_token_id` lacks it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from heretic.errors import UserError
from heretic.model.template import render_messages, template_of
from heretic.model.thinking import MARKERS

ANSWER = "Yes, it is."


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that directly follows an answer in the chat template; None if there is none.

    Tokens that begin or end a thinking block (`<|end|>` of gpt-oss) do not count, since the answer follows them.
    """
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render_messages(tokenizer, messages, {})
    except UserError:  # for example of a template without answers
        return None
    before, answer, after = text.rpartition(ANSWER)
    if not answer or not before:
        return None
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    if not ids or ids[0] not in special or ids[0] == tokenizer.unk_token_id:
        return None
    name = str(tokenizer.convert_ids_to_tokens(ids[0]))
    template = template_of(tokenizer)
    of_thoughts = any(name in marker or (name in end and marker in template) for marker, end in MARKERS.items())
    return None if of_thoughts else int(ids[0])
