"""What the README shows works as it stands there. Its links, commands and figures: test_docs.py, test_figures.py."""

import json
import re
from pathlib import Path

from tests.readme import CHAINS, OPERATIONS, README, short_training, shown_by_operations

ROOT = Path(__file__).parent.parent


def test_the_operations_in_a_loop_of_ones_own(capsys):
    names = {}
    exec(OPERATIONS, names)
    assert capsys.readouterr().out.strip() == shown_by_operations()
    gradients = (names["hidden"].grad, names["head"].weight.grad)
    assert all(bool(gradient.isfinite().all()) and bool((gradient != 0).any()) for gradient in gradients)


def test_fine_tuning_a_model(tmp_path, monkeypatch, capsys):
    """It prints what README shows, figures of the same names, and leaves a model with a card."""
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(short_training(), names)
    trainer = names["trainer"]
    assert (trainer.reward_calls, trainer.state.global_step) == (2 * 4 * 16, 4)
    assert {"config.json", "model.safetensors", "README.md", "checkpoint-4"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    (shown,) = re.findall(r"```text\n(step 0: .*?)```", README, flags=re.DOTALL)
    printed = {line_of(line) for line in capsys.readouterr().out.splitlines() if line.startswith("step ")}
    assert {line_of(line) for line in shown.splitlines() if line.startswith("step ")} == printed
    assert {name for line in printed for name in line} <= {
        name for entry in trainer.state.log_history for name in entry
    }


def line_of(line):
    """Names of the figures in a line of a log, without those of time."""
    told = re.findall(r"([a-z_]+) [-\d.,e]+(?:,|$| )", line.partition(": ")[2].partition(" (")[0])
    return tuple(name for name in told if not re.search("time|second|tokens", name))


def test_a_chain_that_is_not_masked():
    names = {}
    exec(CHAINS, names)
    assert names["path"].final.shape == (64, 3) and abs(float(names["weights"].weight.mean()) - 1) < 1e-5


def test_every_operation_is_listed():
    import dam

    text = README + (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in dam.__all__:
        if name[0].islower():
            assert f"`{name}`" in text or f"dam.{name}" in text, name


def test_what_the_readme_shows_of_a_run_is_of_its_record():
    """Figure by figure; `python -m experiments readme` makes the record. What the text says: test_figures.py."""
    (path,) = (ROOT / "experiments" / "results").glob("*/readme.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert f"[JSON]({path.relative_to(ROOT)})" in README
    (shown,) = re.findall(r"```text\n(step 0: .*?)```", README, flags=re.DOTALL)
    printed = [line for line in record["printed"] if line.startswith("step ")]
    for line, whole in zip(shown.splitlines(), printed, strict=True):
        step, _, figures = line.partition(": ")
        assert whole.startswith(f"{step}: ")
        for figure in figures.split(", "):
            assert figure == "..." or f" {figure}," in f"{whole},", f"{figure} is not in {whole}"


def test_it_is_what_a_newcomer_needs_and_no_longer():
    """Tables that only an expert wants live in docs."""
    assert len(README.splitlines()) <= 281
