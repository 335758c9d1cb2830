"""The front that tasks share, by a second task: a table of three letters that is to write more of one of them."""

import argparse
import dataclasses
import io
import json

import pytest
import torch

from dam.models import Tabular
from dam.tasks import finetune as front
from dam.train import RewardError

LENGTH, MASK = 3, 3


@dataclasses.dataclass(frozen=True)
class Options:
    letter: int = 0
    reward_calls: int = 512
    estimator: str = "posterior"
    normalizer: str = "group"
    seed: int = 0
    null_arm: bool = False


class Letters(front.Task):
    name, title, headline, options_type = "letters", "Letters", "share", Options
    prompts, generations, iterations, evaluations = 4, 16, 2, 4
    fails_at = None  # the reward call that fails

    def __init__(self, options):
        super().__init__(options)
        if not 0 <= options.letter < MASK:
            raise ValueError(f"letter must be in [0, {MASK}); got {options.letter}")
        self.calls = 0

    def model(self, output):
        generator = torch.Generator().manual_seed(0)
        shape = ((MASK + 1) ** LENGTH, LENGTH, MASK + 1)
        return Tabular(0.1 * torch.randn(shape, generator=generator), MASK + 1)

    def training_rows(self):
        return [{"input_ids": [MASK] * LENGTH}] * (self.rollouts * self.prompts)

    def evaluation_rows(self):
        return [{"input_ids": [MASK] * LENGTH}] * 2

    def reward(self):
        def share(completion_ids, **_):
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("out of ink")
            return [sum(token == self.options.letter for token in ids) / LENGTH for ids in completion_ids]

        return share

    def config(self):
        return {
            "beta": 0.05,
            "replay_batch_size": 4,
            "learning_rate": 0.1,
            "mask_token_id": MASK,
            "save_steps": 4,
        }

    def fill_in(self, model):
        """What the table holds likeliest where all is masked, position by position."""
        return model.logits[-1, :, :MASK].argmax(dim=1).expand(2, LENGTH)

    def metrics(self, final):
        return {"share": float((final == self.options.letter).double().mean())}

    def facts(self, before, after):
        return {"before": before[0].tolist(), "after": after[0].tolist()}

    @staticmethod
    def report(result):
        return f"share {result['base_share']:.2f} to {result['share']:.2f}"


def arguments(output, resume=False, **given):
    return argparse.Namespace(output=output, resume=resume, **given)


def test_a_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    assert front.command(Letters, arguments(tmp_path / "run", letter=1)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-3].startswith("share 0.") and out.splitlines()[-3].endswith("to 1.00")
    assert out.endswith(f"model, metrics and plot: {tmp_path / 'run'}\n")
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["after"] == [1, 1, 1] != result["before"] and result["reward_calls"] == 512
    assert {"dam", "python", "transformers"} <= result["versions"].keys()
    assert result["versions"]["torch"] == torch.__version__
    assert {"plot.png", "metrics.jsonl", "run.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["reward_calls"] for entry in logged if "eval_share" in entry] == [0, 128, 256, 384, 512]
    # A finished run is reported again, and not done again.
    assert front.command(Letters, arguments(tmp_path / "run", resume=True)) == 0
    assert capsys.readouterr().out == out
    # On a terminal that lacks a character too, where it is the run's last word.
    monkeypatch.setattr(Letters, "report", staticmethod(lambda result: "数独 é"))
    monkeypatch.setattr("sys.stdout", terminal := io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert front.command(Letters, arguments(tmp_path / "run", resume=True)) == 0
    terminal.flush()
    assert terminal.buffer.getvalue().decode("cp1252").startswith("?? é\n")


def test_a_run_that_failed_goes_on_to_the_same_result(tmp_path, capsys, monkeypatch):
    expected = front.finetune(Letters, tmp_path / "whole", Options())
    with monkeypatch.context() as patch:
        patch.setattr(Letters, "fails_at", 9)  # of rollouts and evaluations
        with pytest.raises(RewardError, match="out of ink"):
            front.finetune(Letters, tmp_path / "part", Options())
        assert front.command(Letters, arguments(tmp_path / "other")) == 1
        assert "dam letters: reward function 'share' raised RuntimeError: out of ink" in capsys.readouterr().err
    result = front.finetune(Letters, tmp_path / "part", Options(), resume=True)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"letter": 3}, "letter must be in [0, 3); got 3"),
        ({"reward_calls": 63}, "reward_calls must be at least 64, one rollout; got 63"),
        ({"seed": -1}, "seed must be in [0, 2^32); got -1"),
        ({"resume": True}, "holds no run of dam letters"),
    ],
    ids=str,
)
def test_an_error_comes_before_the_work(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.setattr(Letters, "model", lambda self, output: pytest.fail("the work has started"))
    assert front.command(Letters, arguments(tmp_path / "run", **given)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_its_own_options_only(tmp_path, capsys):
    front.finetune(Letters, tmp_path / "run", Options(letter=2, reward_calls=64))
    assert front.command(Letters, arguments(tmp_path / "run", resume=True, letter=1)) == 1
    assert "started with other options: letter 2 (now 1)" in capsys.readouterr().err
    assert front.command(Letters, arguments(tmp_path / "run")) == 1
    assert "is not empty: continue the run in it with --resume" in capsys.readouterr().err
