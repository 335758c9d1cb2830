"""Batches: what reward functions see of them, where a completion ends, and that nothing of a dataset is lost."""

import itertools

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderDispatcher
from test_rows import BOT, EOS, A, B, C, reader, tokenizer
from tiny import MASK, ROWS, assert_same_weights, rotary_model, sum_reward, tiny_config, tiny_model

from dam.train import DAMTrainer, RewardError
from dam.train.data import Collator, NumberedRows, Stream, decoded, outcomes

PAD = 1


def collated(rows, words=None):
    return Collator(reader(words), PAD)(rows)


# Batches


def test_shorter_rows_are_padded_on_the_left():
    rows = [
        {"input_ids": [3, 4, MASK, MASK], "labels": [3, 4, 5, 6]},
        {"prompt": [5], "n": 7},
        {"input_ids": [2, MASK]},
    ]
    batch = collated(rows)
    assert batch["input_ids"].tolist() == [[3, 4, MASK, MASK], [5, MASK, MASK, MASK], [PAD, PAD, 2, MASK]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[3, 4, 5, 6], [-100] * 4, [-100] * 4]
    assert batch["start"].tolist() == [4, 1, 4]
    assert batch["columns"] == {"labels": [[3, 4, 5, 6], None, None], "n": [None, 7, None]}


def test_what_attention_does_not_see_is_no_part_of_a_completion():
    """Padding of the row's own is left out like that of the batch."""
    batch = collated([{"input_ids": [PAD, 3, MASK, PAD], "attention_mask": [0, 1, 1, 0]}, {"input_ids": [4, MASK]}])
    seen = outcomes(batch, torch.tensor([[PAD, 3, 5, PAD], [PAD, 3, 6, PAD], [PAD, PAD, 4, 7], [PAD, PAD, 4, 8]]), 2)
    assert seen["prompts"] == [[3, MASK]] * 2 + [[4, MASK]] * 2
    assert seen["completion_ids"] == [[3, 5], [3, 6], [4, 7], [4, 8]]


def test_a_completion_ends_with_its_first_stop_token():
    batch = collated([{"prompt": [EOS, A]}, {"input_ids": [EOS, MASK, MASK, MASK, MASK]}])
    final = torch.tensor([[EOS, A, B, EOS, C], [EOS, A, A, B, C], [EOS, A, BOT, EOS, EOS], [EOS, A, EOS, B, C]])
    seen = outcomes(batch, final, 2, [EOS, BOT])
    assert seen["completion_ids"][:2] == [[B, EOS], [A, B, C]]
    assert seen["completion_ids"][2:] == final[2:].tolist()  # a sequence given as input_ids has no end
    assert outcomes(batch, final, 2)["completion_ids"][0] == [B, EOS, C]


def test_completions_are_text_and_behind_a_conversation_messages():
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    batch = collated([{"prompt": "a"}, {"prompt": begun[:1]}, {"prompt": begun}], tokenizer())
    ids = [[C], [A, EOS], [C, EOS], [B], [A], [C, C]]
    texts = decoded(batch, ids, tokenizer())
    assert texts[:2] == ["c", "a"]
    assert texts[2:] == [[{"role": "assistant", "content": text}] for text in ("c", "b", "b a", "b c c")]
    assert decoded(batch, ids, None) == ids


@pytest.mark.parametrize("fault", ["raises", "none", "fewer"])
def test_a_completion_that_cannot_be_decoded_is_named(fault):
    class Words:
        def batch_decode(self, ids, skip_special_tokens):
            if fault == "fewer":
                return ["a"] * (len(ids) - (C in ids[-1]))
            return [(1 / 0 if fault == "raises" else None) if C in one else "a" for one in ids]

    batch = collated([{"prompt": [A]}])
    with pytest.raises(RewardError, match=rf"completion 2 could not be decoded, \w+Error: .*token ids are \[5, {C}\]"):
        decoded(batch, [[A], [B], [A, C]], Words())


def test_rows_of_a_batch_are_read_at_once_where_the_dataset_can():
    class Table:
        def __len__(self):
            return 9

        def __getitems__(self, indices):
            return [{"n": n} for n in indices]

    assert NumberedRows(Table(), "training").__getitems__([3, 7]) == [
        (3, "row 3 of the training dataset", {"n": 3}),
        (7, "row 7 of the training dataset", {"n": 7}),
    ]
    assert (
        NumberedRows(["a", "b"], "x").__getitems__([1])
        == [(1, "row 1 of the x dataset", "b")]
        == [NumberedRows("ab", "x")[1]]
    )


# Iterable datasets


class Numbers(torch.utils.data.IterableDataset):
    """Rows numbered from 0, in an order that is another in each pass if it is told the pass."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for n in range(self.count):
            yield {"input_ids": [1, MASK, MASK, MASK], "n": (n + self.epoch) % self.count, "text": "words"}


def numbers(stream, count):
    return [numbered.row["n"] for numbered in itertools.islice(stream, count)]


def test_a_batch_comes_again_for_each_step_that_it_feeds():
    """And of 5 rows in batches of 2 none is left out of a pass: what is left over begins the next."""
    read_ = numbers(Stream(Numbers(5), "training", 2, 3), 36)
    batches = [read_[at : at + 2] for at in range(0, 36, 2)]
    assert batches[::3] == batches[1::3] == batches[2::3] == [[0, 1], [2, 3], [4, 1], [2, 3], [4, 0], [2, 3]]
    # Numbers, by which draws are keyed, go on: a batch may have a row of two passes.
    assert [row[:2] for row in itertools.islice(Stream(Numbers(2), "training", 2), 3)] == [
        (number, f"row {n} of the training dataset") for number, n in enumerate((0, 1, 0))
    ]
    assert numbers(Stream(Numbers(3), "evaluation"), 9) == [0, 1, 2]  # once


def test_a_stream_without_rows_is_an_error():
    with pytest.raises(ValueError, match=r"the training dataset gives no rows$"):
        next(iter(Stream(Numbers(0), "training", 2)))
    used_up = iter([{"n": 1}])
    with pytest.raises(
        ValueError, match="gives no rows any more: an iterable dataset must give its rows in every pass"
    ):
        list(Stream(used_up, "training", 1))


def train_on(rows, output, model=None, checkpoint=None, **changes):
    """Numbers of the prompts of each rollout of a run."""
    used = []

    def look(completion_ids, n, **_):
        used.append(sorted(set(n)))
        return sum_reward(completion_ids)

    DAMTrainer(model or tiny_model(), look, tiny_config(output, **changes), rows).train(checkpoint)
    return used


def test_every_prompt_of_an_iterable_dataset_is_used_once_a_pass(tmp_path):
    assert train_on(Numbers(6), tmp_path, max_steps=12) == [[0, 1], [2, 3], [4, 5], [1, 2], [3, 4], [0, 5]]
    assert train_on(Numbers(6), tmp_path, max_steps=3, num_iterations=1, gradient_accumulation_steps=2) == [
        [0, 1, 2, 3], [1, 2, 4, 5], [0, 3, 4, 5]
    ]  # fmt: skip


def test_a_resumed_run_goes_on_in_an_iterable_dataset(tmp_path):
    whole = tiny_model()
    used = train_on(Numbers(6), tmp_path, whole, max_steps=10, save_strategy="steps", save_steps=1)
    for step in (4, 7):
        resumed = tiny_model()
        again = train_on(Numbers(6), tmp_path, resumed, f"{tmp_path}/checkpoint-{step}", max_steps=10)
        assert again == used[(step + 1) // 2 :]
        assert_same_weights(whole, resumed)


def test_evaluation_reads_an_iterable_dataset_once(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, per_device_eval_batch_size=2), ROWS)
    predicted = trainer.predict(Numbers(5))
    assert predicted.predictions.shape == (5, 4)
    assert trainer.evaluate(Numbers(5))["eval_reward"] == predicted.metrics["test_reward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_num_workers": 2}, "the training dataset is iterable: each of 2 workers would read all of it"),
        ({"world_size": 2}, "the training dataset is iterable: 2 processes would share its rows by luck"),
    ],
    ids=str,
)
def test_an_iterable_dataset_that_several_would_read_is_refused(tmp_path, monkeypatch, changes, message):
    if "world_size" in changes:
        monkeypatch.setattr("dam.train.DAMConfig.world_size", changes.pop("world_size"))
    with pytest.raises(ValueError, match=message):
        train_on(Numbers(6), tmp_path, **changes)


def test_batches_are_not_sent_between_processes(tmp_path):
    """Nor from one to itself, as `torchrun --nproc_per_node 1` would: lists cannot be sent."""
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), Numbers(6))
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader(Numbers(6))]
    assert not any(isinstance(loader, DataLoaderDispatcher) for loader in loaders)
    with pytest.raises(ValueError, match="dispatch_batches must be False"):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, accelerator_config={"dispatch_batches": True}), ROWS)


# Evaluated


LABELLED = {"input_ids": [3, MASK, 4], "labels": [3, 2, 4]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([LABELLED, {"input_ids": [5, MASK]}] * 2, [[3, 2, 4], [-100] * 3] * 2),
        ([LABELLED, {"input_ids": [5, MASK], "labels": None}, LABELLED], [[3, 2, 4], [-100] * 3, [3, 2, 4]]),
        ([{"input_ids": [5, MASK]}, {"input_ids": [5, MASK]}, LABELLED], [[-100] * 3, [-100] * 3, [3, 2, 4]]),
        ([{"input_ids": [5, MASK], "labels": [5, 1]}, LABELLED], [[-100, 5, 1], [3, 2, 4]]),
        ([{"input_ids": [5, MASK]}] * 2, None),
        ([{"input_ids": [5, MASK], "labels": "five"}] * 2, None),
        ([LABELLED, LABELLED, {"input_ids": [5, MASK], "labels": 5}], None),
    ],
    ids=["every other", "None", "the last", "of other length", "none", "text", "a number among them"],
)
def test_labels_stay_with_their_rows(tmp_path, rows, expected):
    """Of batches of one or two rows: a row without labels has -100."""
    given, seen = {}, []

    def compute_metrics(prediction):
        given["labels"] = prediction.label_ids
        return {}

    def look(completion_ids, labels=None, **_):
        seen.extend(labels or [])
        return sum_reward(completion_ids)

    config = tiny_config(tmp_path, per_device_eval_batch_size=2)
    trainer = DAMTrainer(rotary_model(), look, config, ROWS, compute_metrics=compute_metrics)
    predicted = trainer.predict(rows)
    for labels in (given["labels"], predicted.label_ids):
        assert (None if labels is None else labels.tolist()) == expected
    assert [label for label in seen if label is not None] == [row["labels"] for row in rows if row.get("labels")]


def test_predict_gives_the_tokens_that_evaluate_fills_in(tmp_path):
    given = []

    def compute_metrics(prediction):
        given.append(prediction.predictions)
        return {"twos": float((prediction.predictions == 2).mean())}

    config = tiny_config(tmp_path, per_device_eval_batch_size=3, dataloader_num_workers=0)
    trainer = DAMTrainer(tiny_model(), sum_reward, config, ROWS, compute_metrics=compute_metrics)
    predicted = trainer.predict(ROWS)
    metrics = trainer.evaluate(ROWS)
    assert predicted.predictions.dtype == np.int64 and predicted.predictions.shape == (8, 4)
    assert (predicted.predictions == given[0]).all() and (given[0] == given[1]).all()
    assert predicted.predictions[:, 0].tolist() == [row["input_ids"][0] for row in ROWS]
    assert MASK not in predicted.predictions
    for name in ("reward", "twos"):
        assert predicted.metrics[f"test_{name}"] == metrics[f"eval_{name}"]
    assert not any("test_reward" in entry for entry in trainer.state.log_history)
    with pytest.raises(ValueError, match="there are no rows to fill in"):
        trainer.predict([])


def test_persistent_workers_evaluate_the_dataset_that_is_given(tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **workers), ROWS)
    for row in ROWS[:2]:  # no worker is started before a row is asked for
        assert trainer.get_eval_dataloader([row]).dataset[0] == (0, "row 0 of the evaluation dataset", row)


def test_a_row_that_cannot_be_filled_in_is_named_in_evaluation(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, per_device_eval_batch_size=2), ROWS)
    with pytest.raises(ValueError, match="row 5 of the evaluation dataset, column 'input_ids': has no mask token"):
        trainer.evaluate([*ROWS[:5], {"input_ids": [1, 2]}])


def test_a_bad_row_is_named_before_the_first_step(tmp_path):
    """Of the evaluation dataset too, if it is to be evaluated."""

    def never(**_):
        pytest.fail("the work has started")

    bad = [*ROWS[:6], {"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="row 6 of the training dataset, column 'input_ids'"):
        DAMTrainer(tiny_model(), never, tiny_config(tmp_path), bad).train()
    config = {"eval_strategy": "steps", "eval_steps": 2}
    for given, name in ((bad, "evaluation"), ({"one": ROWS, "two": bad}, "evaluation 'two'")):
        with pytest.raises(ValueError, match=f"row 6 of the {name} dataset, column 'input_ids'"):
            DAMTrainer(tiny_model(), never, tiny_config(tmp_path, **config), ROWS, given).train()
    assert list(tmp_path.iterdir()) == []
