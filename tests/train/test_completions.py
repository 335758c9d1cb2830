"""Completions of a rollout, shown: which, of whom, and as what."""

import builtins
import io
import sys
import types

import pytest
from tiny import MASK, ROWS, tiny_config, tiny_model

from dam.train import DAMTrainer
from dam.train.completions import Completions

THREE = Completions(
    ["[MASK] a", "b", "[MASK] a"],
    ["one", [{"role": "assistant", "content": "two"}], [3, 4]],
    {"right": [0.5, float("nan"), -1.0], "weight": [1.0, 2.0, 0.0]},
)


def test_a_table_holds_all_of_each_completion(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = THREE.as_text("step 7")
    assert text.splitlines()[0].strip() == "step 7"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["prompt", "completion", "right", "weight"],
        ["[MASK] a", "one", "0.5", "1"],
        ["b", "assistant: two", "nan", "2"],
        ["[MASK] a", "3 4", "-1", "0"],
    ]


def test_without_rich_completions_are_printed_line_by_line(monkeypatch):
    imported = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert THREE.at([1]).as_text("step 7") == "step 7\n\nprompt: b\ncompletion: assistant: two\nright nan, weight 2"


def test_some_of_them_or_one_of_each_prompt():
    assert THREE.of_unique_prompts() == THREE.at([0, 1])
    assert THREE.some(None, [0]) is THREE.some(3, [0]) is THREE
    drawn = [THREE.some(2, [seed]).completions for seed in range(20)]
    assert all(len(each) == 2 for each in drawn)
    assert all(any(completion in each for each in drawn) for completion in THREE.completions)
    assert THREE.some(2, [5]) == THREE.some(2, [5])


def test_wandb_gets_a_table_where_a_run_is_open(monkeypatch):
    logged = []
    wandb = types.SimpleNamespace(run=None, log=logged.append, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    THREE.to_wandb(7)
    assert logged == []
    wandb.run = object()
    THREE.at([0, 2]).to_wandb(7)
    columns = ["step", "prompt", "completion", "right", "weight"]
    rows = [[7, "[MASK] a", "one", 0.5, 1.0], [7, "[MASK] a", "3 4", -1.0, 0.0]]
    assert logged == [{"completions": (columns, rows)}]


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 16), ({"num_completions_to_print": 5}, 5), ({"log_unique_prompts": True}, 2)]
)
def test_what_a_run_shows_is_its_last_rollout(tmp_path, monkeypatch, changes, count):
    """Of 2 prompts, 8 completions each: as rewarded, with the weights that the replay buffer has."""
    shown, seen = [], []

    def first(completion_ids, **_):
        seen[:] = completion_ids
        return [float(sum(ids)) for ids in completion_ids]

    def second(completion_ids, **_):
        return [1.0] * len(completion_ids)

    monkeypatch.setattr(Completions, "as_text", lambda self, title: shown.append((title, self)) or title)
    config = tiny_config(tmp_path, log_completions=True, reward_weights=[1.0, 0.5], max_steps=4, **changes)
    trainer = DAMTrainer(tiny_model(), [first, second], config, ROWS)
    trainer.train()
    assert [title for title, _ in shown] == ["step 2", "step 4"]
    last = shown[-1][1]
    assert len(last.completions) == count and list(last.figures) == ["first", "second", "reward", "weight"]
    weights = [w for group in trainer.progress.replay.state_dict()["groups"][-2:] for w in group["weight"].tolist()]
    every = [(ids, float(sum(ids)), 1.0, sum(ids) + 0.5, weight) for ids, weight in zip(seen, weights, strict=True)]
    told = list(zip(last.completions, *last.figures.values(), strict=True))
    assert all(row in every for row in told)
    assert told == every or count < 16
    assert all(prompt[1:] == [MASK] * 3 for prompt in last.prompts)
    assert len({tuple(prompt) for prompt in last.prompts}) == 2 or count == 5


@pytest.mark.parametrize(("encoding", "seen"), [("utf-8", "数 é → 1"), ("cp1252", "? é ? 1"), ("ascii", "? ? ? 1")])
def test_a_terminal_that_lacks_a_character_ends_no_run(tmp_path, monkeypatch, encoding, seen):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    trainer = DAMTrainer(tiny_model(), lambda **_: [], tiny_config(tmp_path, log_completions=True), ROWS)
    trainer._completions = Completions(["[MASK]"], ["数 é → 1"], {"reward": [1.0]})
    monkeypatch.setattr("sys.stdout", terminal)
    trainer.log({"loss": 0.0})
    terminal.flush()
    edge = "│" if encoding == "utf-8" else "|"
    printed = terminal.buffer.getvalue().decode(encoding)
    assert f"{edge} {seen} " in printed and f"{edge} [MASK] " in printed and "?-" not in printed
