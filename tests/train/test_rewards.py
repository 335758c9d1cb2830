"""Reward functions: what they are given, how they combine, and what is said when one misbehaves."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from transformers import TrainerState

from dam.train.rewards import RewardError, Rewards, total_reward


def means(parts):
    return {name: float(values.nanmean()) for name, values in parts.items()}


def call(functions, weights=None, count=2, **columns):
    return total_reward(
        functions,
        [1.0] * len(functions) if weights is None else weights,
        prompts=[f"p{n}" for n in range(count)],
        completions=[f"c{n}" for n in range(count)],
        completion_ids=[[n] for n in range(count)],
        columns=columns,
    )[:2]


def raises(**_):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (raises, "raised KeyError: 'answer'"),
        ([1.0], "one value per completion, 2; got 1"),
        ([], "one value per completion, 2; got 0"),
        ([1.0, 2.0, 3.0], "one value per completion, 2; got 3"),
        (torch.ones(2, 2), r"returned \[1.0, 1.0\] \(list\) for completion 0"),
        ([np.ones(2), 1.0], r"returned array\(\[1., 1.\]\) \(ndarray\) for completion 0"),
        (torch.ones(()), "must return a list of 2 numbers; got float"),
        (1.0, "must return a list of 2 numbers; got float"),
        (None, "must return a list of 2 numbers; got NoneType"),
        ("10", "must return a list of 2 numbers; got str"),
        ((n for n in (1.0, 2.0)), "must return a list of 2 numbers; got generator"),
        ({0: 1.0, 1: 2.0}, "must return a list of 2 numbers; got dict"),
        ([1.0, math.nan], "returned nan for completion 1"),
        ([math.inf, 1.0], "returned inf for completion 0"),
        ([1.0, "2"], r"returned '2' \(str\) for completion 1"),
        ([1.0, 2j], r"returned 2j \(complex\) for completion 1"),
        ([1.0, 10**400], "for completion 1"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value))[:40],
)
def test_misbehaviour_is_an_error_that_names_the_function(returned, message):
    def my_reward(**arguments):
        return returned(**arguments) if callable(returned) else returned

    with pytest.raises(RewardError, match=f"'my_reward' .*{message}"):
        call([my_reward])


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2],
        (1.0, 2.0),
        np.array([1.0, 2.0], dtype=np.float32),
        torch.tensor([1.0, 2.0]),
        [torch.tensor(1), True + 1],
        np.array([[1.0], [2.0]]),
        torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16, requires_grad=True),
        [np.ones(1), np.full((1, 1), 2.0)],
        [np.bool_(True), np.int8(2)],
    ],
    ids=["list", "tuple", "numpy", "tensor", "mixed", "numpy column", "tensor column", "small arrays", "numpy scalars"],
)
def test_whatever_holds_numbers_is_taken(returned):
    total, _ = call([lambda **_: returned])
    assert total.tolist() == [1.0, 2.0]
    assert total.dtype == torch.float64


def test_truth_values_count_zero_and_one():
    for truth in ([True, False], np.array([True, False]), torch.tensor([True, False]), np.array([[True], [False]])):
        total, _ = call([lambda truth=truth, **_: truth])
        assert total.tolist() == [1.0, 0.0]


def test_functions_of_one_name_are_told_apart():
    """In logs, whose entries one would otherwise overwrite, and in messages; a name that is taken is left alone."""

    def worth(value, **_):
        return [value] * 2

    class Judge:
        def __call__(self, **_):
            return [4.0] * 2

    def worth_1(**_):
        return [0.5] * 2

    partials = [functools.partial(functools.partial(worth), value=value) for value in (1.0, 2.0)]
    _, parts = call([*partials, Judge(), Judge(), worth_1])
    assert means(parts) == {"worth_2": 1.0, "worth_3": 2.0, "Judge_1": 4.0, "Judge_2": 4.0, "worth_1": 0.5}
    with pytest.raises(RewardError, match="'worth_2' returned nan"):
        call([partials[0], functools.partial(worth, value=math.nan)])
    assert means(call([partials[0]])[1]) == {"worth": 1.0}


def test_functions_are_weighted_and_added():
    def first(**_):
        return [1.0, 2.0]

    def second(**_):
        return [10.0, 20.0]

    total, parts = call([first, second], weights=[2.0, 0.5])
    assert total.tolist() == [7.0, 14.0]
    assert means(parts) == {"first": 1.5, "second": 15.0}


def test_none_counts_nothing_and_stays_out_of_the_mean():
    total, _ = call([lambda **_: [None, 2.0], lambda **_: [1.0, None]])
    assert total.tolist() == [1.0, 2.0]

    def sometimes(**_):
        return [None, 2.0]

    assert means(call([sometimes, lambda **_: [1.0, 1.0]])[1])["sometimes"] == 2.0


def test_a_completion_that_no_function_applies_to_is_an_error():
    def picky(**_):
        return [1.0, None]

    with pytest.raises(RewardError, match=r"no reward function applies to completion 1 \(picky gave None\)"):
        call([picky])


def test_minus_infinity_forbids_unless_the_weight_is_zero():
    forbid = [lambda **_: [-math.inf, 1.0], lambda **_: [5.0, 5.0]]
    assert call(forbid)[0].tolist() == [-math.inf, 6.0]
    assert call(forbid, weights=[0.0, 1.0])[0].tolist() == [5.0, 5.0]


def test_a_negative_weight_does_not_turn_forbidden_into_infinitely_good():
    def forbids(**_):
        return [-math.inf, 1.0]

    with pytest.raises(RewardError, match="forbids"):
        call([forbids], weights=[-1.0])


def test_arguments_are_as_documented():
    seen = {}

    def look(**arguments):
        seen.update(arguments)
        return [0.0, 0.0]

    call([look], answer=["a", "b"])
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["c0", "c1"],
        "completion_ids": [[0], [1]],
        "trainer_state": None,
        "answer": ["a", "b"],
    }


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state"])
def test_a_column_does_not_stand_for_what_the_model_wrote(name):
    with pytest.raises(ValueError, match=rf"column '{name}': .*rename_column\('{name}', ...\)"):
        call([lambda **_: [0.0, 0.0]], **{name: ["mine", "mine"]})


def test_a_failure_is_told_where_its_rollouts_cannot_be_kept(tmp_path):
    (tmp_path / "file").touch()
    for output, columns, kept in (
        (tmp_path, {}, rf"step 7 are kept in {tmp_path}/failed_rollouts\.pt"),
        (tmp_path, {"pickled": [lambda: None] * 2}, r"step 7 could not be kept in .*failed_rollouts\.pt \("),
        (tmp_path / "file", {}, r"step 7 could not be kept in .*failed_rollouts\.pt \("),
    ):
        outcomes = {"prompts": ["p", "q"], "completions": [], "completion_ids": [[1], [2]], "columns": columns}
        with pytest.raises(RewardError, match=rf"raised KeyError: 'answer'\. The rollouts of {kept}"):
            Rewards(raises, None, str(output))(outcomes, TrainerState(global_step=7), lambda ids: ids)


def test_no_weights_are_not_weights_of_one():
    with pytest.raises(ValueError, match="one entry per reward function, 1; got 0"):
        Rewards(lambda completions, **_: [0.0] * len(completions), [], "unused")
