"""A run that was stopped, killed or let down by its reward function continues to the weights of one that was not.

Weights are compared bitwise: every random choice depends on seed and step only, so nothing may differ.
"""

import os
import types

import pytest
import torch
from tiny import ROWS, assert_same_weights, sum_reward, tiny_config, tiny_model
from transformers import BertForMaskedLM, TrainerCallback

from dam.adjoint import ESTIMATORS, NORMALIZERS
from dam.train import DAMTrainer, RewardError, last_checkpoint
from tests import covering


class BreaksAt:
    """sum_reward, but its n-th call raises."""

    def __init__(self, n):
        self.left = n

    def __call__(self, **arguments):
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("the judge is away")
        return sum_reward(**arguments)


def uninterrupted(output, *, dropout=0.0, rows=ROWS, **changes):
    model = tiny_model(dropout=dropout)
    trainer = DAMTrainer(model, sum_reward, tiny_config(output, **changes), rows)
    trainer.train()
    return model, trainer


RESUMED = [
    *({"estimator": e, "normalizer": NORMALIZERS[n % len(NORMALIZERS)]} for n, e in enumerate(ESTIMATORS)),
    {"draw_outcomes": 8},
    {"gradient_accumulation_steps": 2, "num_iterations": 1, "rows": ROWS[:6]},  # an epoch ends half-way
    {"max_steps": 11},  # from its last step: into the second epoch, whose prompts come in another order
    {"null_arm": True},
    {"dropout": 0.1},
]
ALSO = [{"estimator": e, "normalizer": n} for e in ESTIMATORS for n in NORMALIZERS]
ALSO = [{"gradient_accumulation_steps": 2}, *(changes for changes in ALSO if changes not in RESUMED)]
# In the middle of a batch of rollouts, between two, and at the end of an epoch and beyond.
STEPS = [3, 4, "last"]


@pytest.mark.parametrize(
    ("changes", "step"),
    [*covering.pairs(RESUMED, STEPS), *(covering.full(changes, step) for changes in ALSO for step in STEPS)],
    ids=lambda value: " ".join(map(str, {**value, "rows": ""}.values())) if isinstance(value, dict) else str(value),
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, changes, step):
    model, trainer = uninterrupted(tmp_path, **changes, save_strategy="steps", save_steps=1)
    step = trainer.state.max_steps - 1 if step == "last" else step
    settings = {name: value for name, value in changes.items() if name not in ("rows", "dropout")}
    resumed = tiny_model(seed=step, dropout=changes.get("dropout", 0.0))  # other weights, which the checkpoint replaces
    again = DAMTrainer(
        resumed, sum_reward, tiny_config(tmp_path, **settings), changes.get("rows", ROWS), ref_model=tiny_model()
    )
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
    assert_same_weights(model, resumed)
    assert again.reward_calls == trainer.reward_calls


MENDED = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 3},
    "uneven epochs": {"gradient_accumulation_steps": 2, "num_iterations": 1, "max_steps": 3, "rows": ROWS[:6]},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize(("case", "broken"), covering.pairs(list(MENDED), [1, 2, 3]))
def test_a_mended_reward_function_loses_nothing(tmp_path, case, broken):
    changes = MENDED[case]
    model, trainer = uninterrupted(tmp_path / "whole", **changes)
    output = tmp_path / "broken"
    rows, dropout = changes.get("rows", ROWS), changes.get("dropout", 0.0)
    config = {name: value for name, value in changes.items() if name not in ("rows", "dropout")}
    failing = DAMTrainer(tiny_model(dropout=dropout), BreaksAt(broken), tiny_config(output, **config), rows)
    with pytest.raises(RewardError, match=r"'BreaksAt' raised ConnectionError: the judge is away.*failed_rollouts\.pt"):
        failing.train()
    kept = torch.load(output / "failed_rollouts.pt")
    prompts = 2 * config.get("gradient_accumulation_steps", 1)  # of a step, and trajectories of each
    assert len(kept["completion_ids"]) == len(kept["prompts"]) == prompts * 8
    assert kept["step"] == failing.state.global_step

    resumed = tiny_model(dropout=dropout)
    again = DAMTrainer(resumed, sum_reward, tiny_config(output, **config), rows)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(model, resumed)
    assert again.reward_calls == trainer.reward_calls


def test_an_error_in_evaluation_also_leaves_a_checkpoint(tmp_path):
    model, _ = uninterrupted(tmp_path / "whole")
    config = {"eval_strategy": "steps", "eval_steps": 4}
    failing = DAMTrainer(
        # The two rollouts of steps 0 and 2, then the evaluation after step 4.
        tiny_model(), BreaksAt(3), tiny_config(tmp_path / "broken", **config), ROWS, ROWS[:1],
    )  # fmt: skip
    with pytest.raises(RewardError, match="the judge is away"):
        failing.train()
    resumed = tiny_model()
    again = DAMTrainer(resumed, sum_reward, tiny_config(tmp_path / "broken", **config), ROWS, ROWS[:1])
    again.train(resume_from_checkpoint=True)
    assert_same_weights(model, resumed)


class Fails:
    """A function whose n-th call raises."""

    def __init__(self, function, n, error=OSError):
        self.function, self.left, self.error = function, n, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error("gone")
        return self.function(*args, **kwargs)


class Words:
    """A tokenizer as far as a run of token ids needs one."""

    pad_token_id, eos_token_id = 1, None

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, one)) for one in ids]

    def save_pretrained(self, folder):
        pass


class Rows(torch.utils.data.Dataset):
    """Rows that are not looked at before they are used."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, n):
        return self.row(n)

    def row(self, n):
        return ROWS[n]


class Watcher(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        self.look()

    def look(self):
        pass


def watched(output, monkeypatch, fails=None, n=0, error=OSError):
    """A trainer all of whose helpers work, but one of them fails at its n-th call."""
    words, rows, watcher = Words(), Rows(), Watcher()
    helpers = {
        "decoding": (words, "batch_decode"),
        "a row": (rows, "row"),
        "a callback": (watcher, "look"),
        "printing": ("dam.train.trainer.show", None),
    }
    compute_metrics = lambda prediction: {"mean": float(prediction.predictions.mean())}  # noqa: E731
    if fails == "metrics":
        compute_metrics = Fails(compute_metrics, n, error)
    elif fails == "printing":
        monkeypatch.setattr("dam.train.trainer.show", Fails(print, n, error))
    elif fails is not None:
        where, name = helpers[fails]
        setattr(where, name, Fails(getattr(where, name), n, error))
    config = tiny_config(
        output, log_completions=True, logging_steps=1, eval_strategy="steps", eval_steps=2, lr_scheduler_type="constant"
    )
    return DAMTrainer(
        tiny_model(), sum_reward, config, rows, ROWS[:2], words, None, [watcher], compute_metrics=compute_metrics
    )


def evaluations(trainer):
    return [(entry["step"], entry["eval_mean"]) for entry in trainer.state.log_history if "eval_mean" in entry]


@pytest.mark.parametrize(
    ("fails", "n", "step"),
    [
        pytest.param("decoding", 2, 2, marks=pytest.mark.full),  # in the evaluation after step 2
        ("decoding", 3, 2),  # in the rollout that follows
        ("printing", 2, 2),  # before that evaluation
        pytest.param("printing", 3, 3, marks=pytest.mark.full),
        ("a row", 7, 2),  # of the fourth batch, which is read while the third is used
        ("a callback", 4, 4),
        ("metrics", 3, 6),  # after the last step
    ],
)
def test_no_failure_loses_the_run(tmp_path, monkeypatch, fails, n, step):
    """Nor an evaluation that was due; a resumed run ends like one in which nothing failed."""
    with monkeypatch.context() as patch:
        whole = watched(tmp_path / "whole", patch)
        whole.train()
        failing = watched(tmp_path / "broken", patch, fails, n)
        with pytest.raises(RewardError if fails == "decoding" else OSError, match="gone"):
            failing.train()
    assert last_checkpoint(str(tmp_path / "broken")) == f"{tmp_path}/broken/checkpoint-{step}"
    assert (tmp_path / "broken" / "failed_rollouts.pt").exists() == (fails == "decoding")
    again = watched(tmp_path / "broken", monkeypatch)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, again.model)
    assert evaluations(again) == evaluations(whole) and len(evaluations(whole)) == 3
    assert again.reward_calls == whole.reward_calls


def test_an_evaluation_that_failed_at_the_end_of_an_epoch_and_run_is_done(tmp_path):
    """Where a resumed run has neither a step nor an epoch left."""
    config = {"eval_strategy": "steps", "eval_steps": 8, "max_steps": 8}
    failing = DAMTrainer(tiny_model(), BreaksAt(5), tiny_config(tmp_path, **config), ROWS, ROWS[:1])
    with pytest.raises(RewardError, match="the judge is away"):
        failing.train()
    again = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **config), ROWS, ROWS[:1])
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "eval_reward" in entry] == [8]
    assert again.state.global_step == 8


@pytest.mark.parametrize("steps", [6, 8])
def test_a_run_that_is_done_is_resumed_to_the_same_weights(tmp_path, steps):
    """Inside an epoch and at its end: no step more, and no evaluation again."""
    config = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2, "max_steps": steps}
    whole = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **config), ROWS, ROWS[:1])
    whole.train()
    again = DAMTrainer(tiny_model(1), sum_reward, tiny_config(tmp_path, **config), ROWS, ROWS[:1])
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{steps}")
    assert_same_weights(whole.model, again.model)
    assert again.state.global_step == steps and again.reward_calls == whole.reward_calls
    told = [entry for entry in again.state.log_history if "eval_reward" in entry]
    assert len(told) <= 1 and all(entry["step"] == steps for entry in told)


def test_a_run_goes_on_with_its_batches_divided_otherwise(tmp_path):
    """A step has the prompts that its arguments say, not the checkpoint, as 4.x has it: sums in another order."""
    config = {"optim": "sgd", "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 3}
    whole = {"prompts": 4, "replay_batch_size": 4}
    parts = {"prompts": 2, "replay_batch_size": 2, "gradient_accumulation_steps": 2}
    ran = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **config, **whole), ROWS)
    ran.train()
    again = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, **config, **parts), ROWS)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert again.reward_calls == ran.reward_calls
    for ours, theirs in zip(again.model.parameters(), ran.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)


def test_an_interrupt_saves_nothing_by_itself(tmp_path, monkeypatch):
    trainer = watched(tmp_path, monkeypatch, "a callback", 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(str(tmp_path)) is None


def test_an_update_that_failed_half_way_is_not_saved(tmp_path, monkeypatch):
    """Its weights are those of no step."""
    trainer = watched(tmp_path, monkeypatch)
    trainer.create_optimizer()
    fails = Fails(trainer.optimizer.step, 3)
    # A method, which schedulers wrap.
    trainer.optimizer.step = types.MethodType(lambda _, *args, **kwargs: fails(*args, **kwargs), trainer.optimizer)
    with pytest.raises(OSError, match="gone"):
        trainer.train()
    assert last_checkpoint(str(tmp_path)) is None


def test_the_best_weights_are_not_saved_as_the_last(tmp_path):
    """An error that comes after they are loaded leaves the checkpoint of the last step as it is."""

    class FailsAtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            raise OSError("gone")

    scores = iter([3.0, 2.0, 1.0])
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = tiny_config(tmp_path, **steps, load_best_model_at_end=True, metric_for_best_model="score")
    trainer = DAMTrainer(
        tiny_model(), sum_reward, config, ROWS, ROWS[:2],
        callbacks=[FailsAtTheEnd()], compute_metrics=lambda _: {"score": next(scores)},
    )  # fmt: skip
    with pytest.raises(OSError, match="gone"):
        trainer.train()
    last, best = (BertForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (6, 2))
    assert_same_weights(trainer.model, best)
    with pytest.raises(AssertionError):
        assert_same_weights(last, best)


def test_what_failed_is_raised_where_no_checkpoint_can_be_saved(tmp_path, monkeypatch):
    trainer = watched(tmp_path, monkeypatch, "decoding", 3)
    monkeypatch.setattr(trainer.progress, "save", Fails(None, 1))
    with pytest.warns(UserWarning, match="no checkpoint of step 2 could be saved: OSError: gone"):
        with pytest.raises(RewardError, match="could not be decoded"):
            trainer.train()


def test_a_run_that_has_not_begun_leaves_no_checkpoint(tmp_path, monkeypatch):
    trainer = watched(tmp_path, monkeypatch, "a row", 1)
    with pytest.raises(OSError, match="gone"):
        trainer.train()
    assert last_checkpoint(str(tmp_path)) is None


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    uninterrupted(tmp_path, save_strategy="steps", save_steps=2)
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-6"
    os.remove(tmp_path / "checkpoint-6" / "dam_state.pt")  # written last
    assert last_checkpoint(str(tmp_path)) == f"{tmp_path}/checkpoint-4"
    with pytest.raises(ValueError, match=r"checkpoint-6' is no whole checkpoint of such a run"):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS).train(f"{tmp_path}/checkpoint-6")


def test_another_number_of_trajectories_is_refused_before_any_work(tmp_path):
    uninterrupted(tmp_path, save_strategy="steps", save_steps=2)
    worked = []
    config = tiny_config(tmp_path, num_generations=4, num_iterations=6)
    again = DAMTrainer(tiny_model(), lambda **_: worked.append(1), config, ROWS)
    with pytest.raises(ValueError, match=r"groups of .*checkpoint-2' have 8 trajectories .* resume with the num_gen"):
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert not worked


@pytest.mark.parametrize("told", [True, False])
def test_groups_are_trained_on_as_they_were_drawn(tmp_path, monkeypatch, told):
    """Though diffusion_steps have changed since: outcomes of fewer calls than masks have no re-masked states."""
    uninterrupted(tmp_path, diffusion_steps=2, max_steps=3, save_strategy="steps", save_steps=1)
    checkpoint = f"{tmp_path}/checkpoint-3"
    if not told:  # by a checkpoint of before groups told
        state = torch.load(f"{checkpoint}/dam_state.pt", weights_only=True)
        for group in state["replay"]["groups"]:
            del group["exact"]
        torch.save(state, f"{checkpoint}/dam_state.pt")
    seen = {}
    for name in ("_at_outcomes", "_on_paths"):
        own = getattr(DAMTrainer, name)

        def kept(self, groups, row_ids, name=name, own=own):
            seen.setdefault(name, []).append(groups["call"].amax(dim=(1, 2)) + 1)
            return own(self, groups, row_ids)

        monkeypatch.setattr(DAMTrainer, name, kept)
    config = tiny_config(tmp_path, diffusion_steps=3, max_steps=8)
    again = DAMTrainer(tiny_model(), sum_reward, config, ROWS, ref_model=tiny_model())
    again.train(resume_from_checkpoint=checkpoint)
    calls = {name: torch.cat(each).unique().tolist() for name, each in seen.items()}
    assert calls == {"_on_paths": [2], "_at_outcomes": [3]}


def test_without_a_checkpoint_resuming_is_an_error(tmp_path):
    assert last_checkpoint(str(tmp_path / "nothing")) is None
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path), ROWS).train(resume_from_checkpoint=True)


def test_training_twice_starts_afresh(tmp_path):
    trainer = DAMTrainer(tiny_model(), sum_reward, tiny_config(tmp_path, max_steps=2), ROWS)
    trainer.train()
    trainer.train()
    assert trainer.reward_calls == 16
    assert len(trainer.progress.replay) == 2
