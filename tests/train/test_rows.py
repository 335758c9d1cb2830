"""Rows of a dataset: what they become, and that what cannot be right is refused by row and column."""

import re

import numpy as np
import pytest
import torch
from tiny import MASK, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from dam.train.data import check_rows
from dam.train.rows import RowReader
from dam.train.tokens import Limits, limits_of, special_tokens
from tests.architectures import small_sizes

WORDS = ["[MASK]", "[PAD]", "<eos>", "<user>", "<bot>", "a", "b", "c"]
EOS, USER, BOT, A, B, C = range(2, 8)
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }}"
    "{% if not loop.last or m.role == 'user' %} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}{{ ' c' if loud else '' }}"
)


def tokenizer(template=TEMPLATE, behind="<eos>"):
    """Words by spaces, and an end of text behind each text, as [SEP] behind BERT's."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if behind is not None:
        words.post_processor = processors.TemplateProcessing(
            single=f"<bot> $A {behind}", special_tokens=[("<bot>", BOT), (behind, WORDS.index(behind))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", pad_token="[PAD]", eos_token="<eos>")
    made.chat_template = template
    return made


def reader(words=None, limits=None, **template):
    return RowReader(MASK, 3, words, limits, template)


def read(row, words=None, **options):
    return reader(words, **options).read(row, "row 4")


# What a row becomes


def test_a_row_s_own_attention_mask_is_kept():
    sequence = read({"input_ids": [1, 1, 3, 4, MASK], "attention_mask": [0, 0, 1, 1, 1]})
    assert sequence.attention_mask == [0, 0, 1, 1, 1]
    assert read({"input_ids": [3, MASK, 1], "attention_mask": np.array([True, True, False])}).attention_mask == [
        1,
        1,
        0,
    ]
    assert read({"prompt": [1, 3, 4], "attention_mask": [0, 1, 1]}).attention_mask == [0, 1, 1, 1, 1, 1]
    assert read({"input_ids": [3, MASK]}).attention_mask == [1, 1]


def test_a_completion_ends_with_a_block_where_it_is_to():
    """Counted from the prompt's first token that is shown; what a row gives as a whole stays as it is."""
    reads = RowReader(MASK, 3, multiple=4).read
    lengths = {n: len(reads({"prompt": [3] * n}, "row 4").input_ids) for n in range(1, 6)}
    assert lengths == {1: 4, 2: 8, 3: 8, 4: 8, 5: 8}
    hidden = reads({"prompt": [1, 3, 4], "attention_mask": [0, 1, 1]}, "row 4")
    assert hidden.input_ids == [1, 3, 4] + 6 * [MASK] and hidden.attention_mask == [0] + 8 * [1] and hidden.start == 3
    assert reads({"input_ids": [3, MASK]}, "row 4").input_ids == [3, MASK]


@pytest.mark.parametrize("name", ["prompt_length", "start", "labels", "openings", "attention"])
def test_any_other_name_is_the_user_s(name):
    """Nothing of ours goes by the name of a column."""
    sequence = read({"input_ids": [3, 4, MASK], name: "mine"})
    assert sequence.columns == {name: "mine"}
    assert (sequence.input_ids, sequence.start, sequence.labels) == ([3, 4, MASK], 3, None)


@pytest.mark.parametrize("ids", [torch.tensor([3, MASK]), np.array([3, MASK], dtype=np.uint8), (3, MASK)], ids=str)
def test_token_ids_come_as_lists_arrays_and_tensors(ids):
    assert read({"input_ids": ids}).input_ids == [3, MASK]


@pytest.mark.parametrize("behind", ["<eos>", None])
def test_nothing_stands_between_prompt_and_completion(behind):
    """What a tokenizer puts in front of a text stays; what the text itself ends with too."""
    front = [] if behind is None else [BOT]
    words = tokenizer(behind=behind)
    assert read({"prompt": "a b"}, words).input_ids == [*front, A, B, MASK, MASK, MASK]
    assert read({"prompt": "a <eos>"}, words).input_ids == [*front, A, EOS, MASK, MASK, MASK]
    assert read({"prompt": "<bot>"}, words).input_ids == [*front, BOT, MASK, MASK, MASK]  # of the text, as in front
    assert read({"prompt": ""}, words).input_ids == [*front, MASK, MASK, MASK]


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused():
    def words(text, add_special_tokens=True):
        return {"input_ids": [A, C] if add_special_tokens else [A, B]}

    with pytest.raises(
        ValueError, match=r"row 4, column 'prompt': has other tokens with .* special tokens than without"
    ):
        read({"prompt": "a b"}, words)


def test_a_conversation_goes_through_the_chat_template():
    question = [{"role": "user", "content": "a b"}]
    sequence = read({"prompt": question}, tokenizer())
    assert sequence.input_ids == [USER, A, B, EOS, BOT, MASK, MASK, MASK]
    assert (sequence.start, sequence.prompt, sequence.opening) == (5, question, "")
    louder = read({"prompt": question}, tokenizer(), loud=True)
    assert louder.input_ids == [USER, A, B, EOS, BOT, C, MASK, MASK, MASK]


def test_an_assistant_s_last_message_is_continued():
    """As in TRL: it is no part of the prompt that reward functions see, but the beginning of the completion."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sequence = read({"prompt": messages}, tokenizer())
    assert sequence.input_ids == [USER, A, EOS, BOT, B, MASK, MASK, MASK]
    assert (sequence.prompt, sequence.opening) == (messages[:1], "b")


@pytest.mark.parametrize("labels", [1, "c", 0.5, ["c", "d"], [0.5, 1.0], {"answer": 3}, None], ids=str)
def test_labels_of_any_type_are_a_column(labels):
    for row in ({"input_ids": [3, MASK]}, {"prompt": [3]}):
        sequence = read({**row, "labels": labels})
        assert sequence.labels is None and sequence.columns["labels"] == labels


def test_integer_labels_stand_where_they_belong():
    assert read({"input_ids": [3, MASK], "labels": [3, 5]}).labels == [3, 5]
    assert read({"prompt": [3, 4], "labels": [5, 6]}).labels == [-100, -100, 5, 6, -100]
    assert read({"prompt": [3, 4], "labels": torch.tensor([3, 4, 5, 6, 7])}).labels == [3, 4, 5, 6, 7]


# What is refused

IDS = {"input_ids": [3, 4, MASK]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompts": 1}, "row 4, column 'prompts': .*Rename the column, dataset.rename_column"),
        ({"completions": 1}, "column 'completions': .*Rename the column"),
        ({"completion_ids": 1}, "column 'completion_ids': .*Rename the column"),
        ({"input_ids": None}, "row 4, column 'input_ids': must be a list of token ids; got None"),
        ({"input_ids": []}, r"column 'input_ids': must be a list of token ids; got \[\]"),
        ({"input_ids": [3, None, MASK]}, "column 'input_ids': .* got None at position 1"),
        ({"input_ids": [3, 1.5, MASK]}, "column 'input_ids': .* got 1.5 at position 1"),
        ({"input_ids": [[3, MASK]]}, r"column 'input_ids': .* got \[3, 0\] at position 0"),
        ({"input_ids": torch.tensor([[3, MASK]])}, r"column 'input_ids': .* got shape \[1, 2\]"),
        ({"input_ids": [3, -1, MASK]}, r"column 'input_ids': token ids must be in \[0, 6\), .*; got -1 at position 1"),
        ({"input_ids": [3, MASK, 6]}, "column 'input_ids': token ids must be .*; got 6 at position 2"),
        ({"input_ids": [3, 4]}, r"column 'input_ids': has no mask token \(id 0\), so nothing to fill in"),
        ({"input_ids": [MASK] * 9}, "column 'input_ids': makes a sequence of 9 tokens, more than the 8 positions"),
        (
            {"attention_mask": [1, 1]},
            "column 'attention_mask': must be 0 or 1 for each of the 3 tokens .* got 2 numbers",
        ),
        ({"attention_mask": [1, 2, 1]}, r"column 'attention_mask': must be 0 or 1 .*; got 3 numbers, \[1, 2, 1\]"),
        ({"attention_mask": None}, "column 'attention_mask': .*got None"),
        ({"attention_mask": [1, 1, 0]}, "column 'attention_mask': is 0 at position 2, which holds the mask token"),
        ({"labels": [3, 4]}, "column 'labels': must have 3, one for each token of input_ids; got 2.*rename_column"),
    ],
    ids=str,
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        reader(limits=Limits(ids=6, positions=8)).read({**IDS, **row}, "row 4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "row 4, column 'prompt': must be text, token ids or a list of messages; got None"),
        ({"prompt": 7}, "column 'prompt': must be text, token ids or a list of messages; got 7"),
        ({"prompt": [A, None]}, "column 'prompt': .* got None at position 1"),
        ({"prompt": [A, 9]}, "column 'prompt': token ids must be .* got 9 at position 1"),
        ({"prompt": [A, MASK]}, r"column 'prompt': holds the mask token \(id 0\)"),
        ({"prompt": "a [MASK]"}, r"column 'prompt': holds the mask token \(id 0\)"),
        ({"prompt": [A] * 6}, "makes a sequence of 9 tokens, .*max_completion_length is 3"),
        ({"prompt": [{"content": "a"}]}, 'column \'prompt\': message 0 must have a "role" and a "content"'),
        ({"prompt": [{"role": "user", "content": "a"}, "b"]}, "column 'prompt': message 1 must have"),
        (
            {"prompt": [{"role": "assistant", "content": None}]},
            "column 'prompt': the assistant's message .* must have text",
        ),
        (
            {"prompt": "a", "attention_mask": [1]},
            "column 'attention_mask': goes with token ids, but the prompt is text",
        ),
        ({"prompt": [A], "labels": [A] * 5}, "column 'labels': must have at most 3 for the completion, or 4 with"),
        ({"question": "a"}, r"row 4 needs input_ids or prompt; this one has \['question'\]"),
        (["a"], "row 4 must be a dict of columns; got list"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        reader(tokenizer(), limits=Limits(ids=9, positions=8)).read(row, "row 4")


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]], ids=["text", "conversation"])
def test_text_needs_a_tokenizer(prompt):
    with pytest.raises(ValueError, match=r"row 4, column 'prompt': .* prompts need a tokenizer: pass processing_class"):
        read({"prompt": prompt})


def test_a_conversation_needs_a_template():
    with pytest.raises(
        ValueError, match=r"row 4, column 'prompt': could not be put into .* chat template .*chat_template"
    ):
        read({"prompt": [{"role": "user", "content": "a"}]}, tokenizer(template=None))


# A whole dataset


def test_a_dataset_is_looked_through_without_tokenising_it():
    calls = []
    words = tokenizer()

    class Counted:
        mask_token = "[MASK]"

        def __call__(self, text, **options):
            calls.append(text)
            return words(text, **options)

    rows = [{"prompt": f"a {'b ' * n}"} for n in range(50)]
    check_rows(reader(Counted()), rows, "training")
    assert set(calls) == {"a ", "a"}  # the first row, and a plain text for what is put in front
    rows[30] = {"prompt": "a [MASK] b"}
    with pytest.raises(ValueError, match="row 30 of the training dataset, column 'prompt': holds the mask token"):
        check_rows(reader(Counted()), rows, "training")
    rows[10] = {"prompt": [A, B]}
    rows[20] = {"prompt": [{"role": "user", "content": "a"}]}  # the first of its kind
    with pytest.raises(ValueError, match="row 20 of the training dataset, column 'prompt': could not be put into"):
        check_rows(reader(Counted()), rows, "training")


class Table:
    """What is used of a `datasets.Dataset`."""

    def __init__(self, columns, kind=None):
        self._columns, self.format = columns, {"type": kind}

    def __getitem__(self, n):
        raise AssertionError("a row at a time is slow")

    @property
    def column_names(self):
        return list(self._columns)

    def select_columns(self, names):
        return Table({name: self._columns[name] for name in names})

    def iter(self, batch_size):
        for start in range(0, len(next(iter(self._columns.values()))), batch_size):
            yield {name: values[start : start + batch_size] for name, values in self._columns.items()}


def test_a_table_is_looked_through_by_its_columns():
    ids = [[3, MASK]] * 2500
    check_rows(reader(), Table({"input_ids": ids, "answer": [None] * 2500}), "training")
    with pytest.raises(ValueError, match="row 2400 of the training dataset, column 'input_ids': has no mask token"):
        check_rows(reader(), Table({"input_ids": [*ids[:2400], [3, 4], *ids[:99]]}), "training")
    with pytest.raises(ValueError, match=r"the training dataset, column 'prompts': .*Rename"):
        check_rows(reader(), Table({"input_ids": ids, "prompts": ids}), "training")
    check_rows(reader(), Table({"raw": ids}, kind="custom"), "training")  # a transform makes other columns of these


# Special tokens and limits


def test_padding_is_a_token_that_the_model_has():
    class Config:
        pad_token_id = -1

    assert special_tokens(MASK, None, Config()).pad == 1
    Config.pad_token_id = 6
    assert special_tokens(MASK, None, Config(), ids=6).pad == 1
    assert special_tokens(MASK, None, Config(), ids=7).pad == 6


@pytest.mark.parametrize("mask", [-1, 6])
def test_the_mask_is_a_token_that_the_model_takes(mask):
    with pytest.raises(
        ValueError, match=re.escape(f"the mask token must be an id that the model takes, in [0, 6); got {mask}")
    ):
        special_tokens(mask, None, None, ids=6)


def test_a_text_ends_at_the_tokenizer_s_end_or_at_the_given_tokens():
    assert special_tokens(MASK, tokenizer(), None).stop == (EOS,)
    assert special_tokens(MASK, tokenizer(), None, stop=[BOT, USER]).stop == (BOT, USER)
    assert special_tokens(MASK, tokenizer(), None, stop=[]).stop == ()
    assert special_tokens(MASK, None, None).stop == ()
    assert special_tokens(EOS, tokenizer(), None).stop == ()  # a mask is no end


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn_and_given_ones_besides():
    found = special_tokens(MASK, tokenizer(), None, suppress=[USER, MASK])
    assert (found.suppress, found.vocabulary) == ((USER, MASK), len(WORDS))
    assert special_tokens(MASK, tokenizer(), None).suppress == ()
    for unknown in (None, len):  # a decoder of the caller's own
        assert special_tokens(MASK, unknown, None).vocabulary is None

    class Gap:
        """A tokenizer with an id beyond its length: others are missing."""

        def __len__(self):
            return 3

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 9}

    assert special_tokens(MASK, Gap(), None).vocabulary == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress": [3, 70], "ids": 64}, r"suppress_tokens must be ids that the model takes, in \[0, 64\); got 70"),
        ({"stop": [B, USER], "suppress": [USER]}, f"token {USER} ends completions but is in suppress_tokens"),
        ({"suppress": [EOS]}, f"token {EOS} ends completions but is in suppress_tokens.*set stop_token_ids without it"),
        ({"stop": [B, MASK]}, f"stop_token_ids has {MASK}, the mask token"),
        ({"stop": [60], "ids": 64}, "stop_token_ids has 60, which is never drawn: the tokenizer's ids are below 8"),
    ],
    ids=str,
)
def test_tokens_that_are_never_drawn_and_should_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        special_tokens(MASK, tokenizer(), None, **options)


@pytest.mark.parametrize("kind", ["bert", "roberta", "rotary"])
def test_a_model_s_limits_are_those_of_its_tables(kind):
    """The longest sequence runs, and one more is too long; a rotary model has no longest."""
    sizes = small_sizes(6)
    if kind == "bert":
        model, longest = tiny_model(), 16
    elif kind == "roberta":
        model, longest = RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**sizes)), 30
    else:
        rotary = ModernBertConfig(**sizes, cls_token_id=None, sep_token_id=None)
        model, longest = ModernBertForMaskedLM(rotary), None
    assert limits_of(model) == (6, longest)
    model(input_ids=torch.full((1, longest or 40), 3))
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 3))
    assert limits_of(torch.nn.Linear(2, 2)) == (None, None)
