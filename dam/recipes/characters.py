"""A tokenizer that is made without a file: a token for each character."""

from __future__ import annotations

from typing import Any

SPECIAL = ("[PAD]", "[MASK]", "[EOS]", "[UNK]")
CHARACTERS = ("\n", *map(chr, range(32, 127)))
# As short as it can be: a character is a token. A last message of the assistant is left open, to be continued.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
)


def characters_tokenizer() -> Any:
    """A tokenizer of printable ASCII and line ends, with tokens for padding, mask, end of text and what is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made
