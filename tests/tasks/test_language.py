"""What language tasks share: rows out of datasets, prompts, rewards as the trainer calls them, pass@k."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest

from dam.tasks import TASKS, language, sudoku_text
from dam.tasks.answers import boxed, marked, tagged, text_of
from dam.train.rewards import total_reward

datasets = pytest.importorskip("datasets")

COUNTDOWN = [{"nums": [30, 100, 93], "target": 23}, {"nums": [2, 3, 4, 5], "target": 14}]
SUDOKU = [
    {"Puzzle": "0034340001404001", "Solution": "1234341221434321"},
    {"Puzzle": "3102200002100320", "Solution": "3142243142131324"},
]
RECORDS = {
    "countdown": COUNTDOWN,
    "gsm8k": [
        {"question": "What is 9 * 8?", "answer": "9 * 8 = <<9*8=72>>72\n#### 72"},
        {"question": "What is a gross and a thousand?", "answer": "#### 1,144"},
    ],
    "math": [
        {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2"},
        {"problem": "What is half of $1$?", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}"},
    ],
    "sudoku_text": SUDOKU,
}
# A right answer of the first record, a wrong one and none, and the published reward of each.
REWARDED = {
    "countdown": (["93-(100-30)", "93-(100+30)", "23"], [1.0, 0.1, 0.0]),
    "gsm8k": (["72", "71", "none"], [3.0, 1.0, 0.5]),
    "math": (["2", "3", ""], [2.5, 0.5, 0.0]),
    "sudoku_text": (["1234341221434321", "1234341221434312", "1234"], [1.0, 7 / 8, 2 / 8]),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def workers():
    yield
    TASKS["math"].close()


# pass@k


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n, k):
    for c in range(n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert language.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_unbiased():
    n, p = 8, 0.3
    for k in range(1, n + 1):
        law = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(chance * language.pass_at_k(n, c, k) for c, chance in enumerate(law))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        language.pass_at_k(n, c, k)


# Metrics


def test_metrics_by_hand():
    rows = [{"numbers": [2, 3], "target": 5}, {"numbers": [2, 3], "target": 6}]
    right, wrong = "<answer>2+3</answer>", [{"role": "assistant", "content": "<answer>3-2</answer>"}]
    found = TASKS["countdown"].metrics([[right, wrong, wrong, "none"], [right, wrong, wrong, wrong]], rows)
    # The first row has 1 of 4 right: pass@2 = 1 - C(3,2)/C(4,2) = 1/2. The second has none.
    assert {name: found[name] for name in ("exact", "pass@1", "pass@2", "pass@4")} == {
        **{"exact": 1 / 8, "pass@1": 1 / 8, "pass@2": 1 / 4, "pass@4": 1 / 2}
    }
    assert found["format"] == found["answer"] == 7 / 8
    # Distances: 0, 4, 4 of the first row; 1, 5, 5, 5 of the second.
    assert found["closeness"] == pytest.approx((1 + 2 * 10 / 14 + 10 / 11 + 3 * 10 / 15) / 8)


def test_pass_at_k_goes_up_to_the_number_of_completions():
    rows = [{"answer": "1"}]
    for count, ks in [(1, [1]), (3, [1, 2]), (4, [1, 2, 4]), (16, [1, 2, 4, 8, 16])]:
        found = TASKS["gsm8k"].metrics([["1"] * count], rows)
        assert [name for name in found if name.startswith("pass@")] == [f"pass@{k}" for k in ks]


@pytest.mark.parametrize(
    ("groups", "what"), [([["1"]], "got 1 of 2"), ([["1"], []], "equally many"), ([[], []], "one or")]
)
def test_metrics_refuse(groups, what):
    with pytest.raises(ValueError, match=what):
        TASKS["gsm8k"].metrics(groups, [{"answer": "1"}] * 2)


# Rows


def written(records, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        table = datasets.Dataset.from_list(records)
        (table.to_parquet if path.suffix == ".parquet" else table.to_csv)(str(path))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", TASKS)
def test_rows_of_files(name, kind, tmp_path):
    task = TASKS[name]
    rows = task.rows(str(written(RECORDS[name], tmp_path / f"data{kind}")), split="test")
    assert rows == [task.row(record) for record in RECORDS[name]]
    assert all(row["prompt"][0]["role"] == "user" for row in rows)


def test_rows_of_csv_files_keep_zeros_in_front(tmp_path):
    """`datasets` reads 0034340001404001 as 34340001404001."""
    rows = TASKS["sudoku_text"].rows(str(written(SUDOKU, tmp_path / "puzzles.csv")))
    assert [(row["puzzle"], row["solution"]) for row in rows] == [(x["Puzzle"], x["Solution"]) for x in SUDOKU]


def test_rows_of_d1_files(tmp_path):
    records = [{"input": "30,100,93", "output": "23"}, {"input": "7", "output": "7"}]
    for kind in (".jsonl", ".csv"):
        rows = TASKS["countdown"].rows(str(written(records, tmp_path / f"d1{kind}")))
        assert [(row["numbers"], row["target"]) for row in rows] == [([30, 100, 93], 23), ([7], 7)]


def test_rows_of_folders(tmp_path):
    written(RECORDS["gsm8k"][:1], tmp_path / "plain" / "train.jsonl")
    written(RECORDS["gsm8k"][1:], tmp_path / "plain" / "test.jsonl")
    splits = {name: datasets.load_dataset(str(tmp_path / "plain"), split=name) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    splits["test"].save_to_disk(str(tmp_path / "one"))
    task = TASKS["gsm8k"]
    for folder in ("plain", "saved"):
        for split, record in zip(("train", "test"), RECORDS["gsm8k"], strict=True):
            assert task.rows(str(tmp_path / folder), split=split) == [task.row(record)]
        with pytest.raises(ValueError, match="validation"):
            task.rows(str(tmp_path / folder), split="validation")
    assert task.rows(str(tmp_path / "one")) == [task.row(RECORDS["gsm8k"][1])]


def test_rows_of_the_hub(monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return RECORDS["gsm8k"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(TASKS["gsm8k"].rows()) == 2
    TASKS["gsm8k"].rows("someone/else", split="test")
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("someone/else", None), {"split": "test"}),
    ]


def test_limit_and_styles(tmp_path):
    path = str(written(RECORDS["gsm8k"], tmp_path / "data.jsonl"))
    (row,) = TASKS["gsm8k"].rows(path, limit=1, style="llada")
    plain, tags = row["prompt"][0]["content"], TASKS["gsm8k"].rows(path)[0]["prompt"][0]["content"]
    assert "What is 9 * 8?" in plain and "boxed{}" in plain and "<answer>" not in plain
    assert tags.endswith("What is 9 * 8?") and "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>" in tags


@pytest.mark.parametrize("style", language.STYLES)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_say_where_the_answer_goes(name, style):
    (message,) = TASKS[name].row(RECORDS[name][0], style=style)["prompt"]
    assert ("<answer>" in message["content"]) == (style == "d1")
    assert (r"\boxed{}" in message["content"]) == (style == "llada" or name == "math")


@pytest.mark.parametrize(
    ("name", "records", "what"),
    [
        (
            "gsm8k",
            [{"question": "?", "answer": "#### 1"}, {"question": "?", "answer": "#### many"}],
            "row 1: answer must",
        ),
        ("gsm8k", [{"question": "?"}], "row 0: needed: question, answer; missing: answer; found: question"),
        ("countdown", [{"nums": [1, 2]}], "row 0: needed: nums and target"),
        ("countdown", [{"nums": [1.5, 2], "target": 3}], "row 0: nums must be integers"),
        ("countdown", [{"nums": [], "target": 3}], "row 0: nums must be 1 to 16"),
        ("countdown", [{"nums": [1] * 17, "target": 3}], "row 0: nums must be 1 to 16"),
        ("countdown", [{"nums": [-1, 2], "target": 3}], "row 0: nums must be 1 to 16"),
        ("countdown", [{"nums": [1, 2], "target": "three"}], "row 0: target must be integers"),
        ("countdown", [{"nums": [1, 2], "target": [1, 2]}], "row 0: target must be one integer"),
        ("sudoku_text", [{"Puzzle": "1" * 16, "Solution": "1" * 16}], "row 0: Puzzle has no blank"),
        ("sudoku_text", [{"Puzzle": SUDOKU[0]["Puzzle"], "Solution": SUDOKU[1]["Solution"]}], "row 0: Solution contr"),
    ],
)
def test_a_row_that_cannot_be_right_is_named(name, records, what, tmp_path):
    path = written(records, tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=what) as error:
        TASKS[name].rows(str(path))
    assert str(path) in str(error.value)


def test_sources_that_cannot_be_read(tmp_path):
    task = TASKS["gsm8k"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        task.rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"question": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read as a dataset"):
        task.rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty"):
        task.rows(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="style must be one of"):
        task.rows(str(tmp_path / "none.jsonl"), style="d2")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        task.rows(str(tmp_path / "none.jsonl"), limit=0)


def test_no_datasets_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"discrete-adjoint-matching\[tasks\]"):
        TASKS["gsm8k"].rows(str(tmp_path / "data.jsonl"))


# Rewards


@pytest.mark.parametrize("name", TASKS)
def test_rewards_are_the_published_ones_as_the_trainer_calls_them(name):
    task = TASKS[name]
    answers, published = REWARDED[name]
    row = task.row(RECORDS[name][0])
    columns = {column: [value] * 3 for column, value in row.items() if column != "prompt"}
    for message in (False, True):
        texts = [f"<reasoning>\n?\n</reasoning>\n<answer>\n{answer}\n</answer>" for answer in answers]
        completions = [[{"role": "assistant", "content": text}] if message else text for text in texts]
        total, parts, *_ = total_reward(
            task.rewards,
            task.reward_weights,
            prompts=[row["prompt"]] * 3,
            completions=completions,
            completion_ids=[[1]] * 3,
            columns=columns,
        )
        assert total.tolist() == pytest.approx(published)
        assert {"format", "correct"} <= parts.keys() and parts["correct"].tolist() == [1.0, 0.0, 0.0]


def test_every_task_has_a_weight_for_each_part():
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.rewards) == len(task.reward_weights) == len({part.__name__ for part in task.rewards})


# Where answers are


@pytest.mark.parametrize(
    ("text", "tag", "box", "mark"),
    [
        ("<answer> 5 </answer>", "5", None, "5"),
        ("<answer>5", None, None, None),
        (r"\boxed{5}", None, "5", "5"),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"<answer>5</answer>\boxed{6}", "5", "6", "5"),
        (r"<answer>5 \boxed{6}", None, "6", None),
        (r"\boxed{\{1, 2\}}", None, r"\{1, 2\}", r"\{1, 2\}"),
        (r"\boxed{\}", None, None, None),
        (r"\boxed{a\\}", None, r"a\\", r"a\\"),
        (r"\boxed {5}", None, "5", "5"),
        ("\\boxed 5\n6", None, "5", "5"),
        (r"\boxed", None, None, None),
        (r"\boxed{5} \fbox{6}", None, "6", "6"),
        ("<answer></answer>", "", None, None),
        ("<answer>" + "5" * 2001 + "</answer>", "5" * 2001, None, None),
        ("<answer>5</answer>" + " " * 65_536, None, None, None),
        (" " * 65_536 + "<answer>5</answer>", "5", None, "5"),
    ],
)
def test_where_an_answer_is(text, tag, box, mark):
    assert (tagged(text), boxed(text), marked(text)) == (tag, box, mark)


def test_completions_that_are_no_text_are_an_error():
    for completion in (None, 5, [], [5], [{"role": "assistant"}], [{"content": None}]):
        with pytest.raises(TypeError, match="must be text or messages"):
            text_of(completion)
    assert text_of([{"role": "assistant", "content": "5"}]) == "5"


def test_the_example_of_the_docs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    path = written([{"nums": [2, 3, 4], "target": 10}], tmp_path / "problems.jsonl")
    names = {}
    exec(example.replace('"problems.jsonl"', repr(str(path))), names)
    assert names["figures"]["exact"] == 0.5 and names["figures"]["pass@2"] == 1.0


def test_rows_have_no_figure_that_is_another_than_the_mean():
    """Of a puzzle with several solutions an answer may solve it and not be the listed one."""
    rows = [{"puzzle": "0" * 16, "solution": "1234341221434321"}]
    other = "1234341243212143"
    assert sudoku_text.grid_of(other) is not None
    means, by_row = TASKS["sudoku_text"].metrics_by_row([[f"<answer>{other}</answer>"]], rows)
    assert (means["exact"], means["solved"], means["pass@1"]) == (0.0, 1.0, 1.0)
    for name, values in by_row.items():
        assert means[name] == sum(values) / len(values)
