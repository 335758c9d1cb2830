"""What the trainer builds on is there in the transformers that is installed, and is called."""

import inspect

import pytest
import torch
import transformers
from tiny import ROWS, sum_reward, tiny_config, tiny_model

from dam.train import DAMConfig, DAMTrainer, FlowTrainer, releases
from tests import versions

OUTERMOST = {"__init__", "train", "predict"}  # a caller's
MODULES = ("dam.train.trainer", "dam.train.flow_trainer", "dam.train.resumable", "dam.train.releases")


@pytest.mark.parametrize("trainer", [DAMTrainer, FlowTrainer])
def test_no_method_is_overridden_in_vain(trainer):
    """A release that has none of that name, or does not call it, would go on without it and say nothing."""
    source = inspect.getsource(transformers.trainer) + inspect.getsource(releases)
    ours = [cls for cls in trainer.__mro__ if cls.__module__ in MODULES]
    methods = {name for cls in ours for name in vars(cls) if inspect.isfunction(vars(cls)[name])}
    overridden = {name for name in methods if hasattr(releases.BaseTrainer, name)} - OUTERMOST
    assert {*releases.OVERRIDDEN, "_get_dataloader", "compute_loss", "get_batch_samples", "log"} <= overridden
    for name in (*overridden, *releases.CALLED):
        assert hasattr(releases.BaseTrainer, name), name
        assert f"self.{name}(" in source or f"self.{name}," in source, name
    # Instead of an epoch, what reads its batches.
    assert hasattr(transformers.Trainer, "_run_epoch") or releases._NoStepBeyond in trainer.__mro__


@pytest.mark.parametrize(
    ("given", "dtype"),
    [({}, torch.float32), ({"dtype": "auto"}, torch.bfloat16), ({"torch_dtype": "auto"}, torch.bfloat16)],
)
def test_a_model_by_name_is_float32_unless_told(tmp_path, given, dtype):
    """Whatever its checkpoint has, and by either name of the argument."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path, model_init_kwargs=given)
    trainer = DAMTrainer(str(tmp_path / "model"), sum_reward, config, ROWS)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}


def test_precision_is_around_the_model_alone(tmp_path):
    """What a rollout casts without a gradient would serve the training step else, on a CPU under 4.x."""
    seen = []

    def reward(**arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return sum_reward(**arguments)

    trainer = DAMTrainer(tiny_model(), reward, tiny_config(tmp_path, bf16=True, max_steps=1), ROWS)
    trainer.train()
    assert seen == [False]


def test_nothing_is_reported_unless_asked(tmp_path, monkeypatch):
    """4.x by itself reports to all that is installed, wandb for one."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    assert DAMConfig(str(tmp_path), use_cpu=True).report_to == []
    assert DAMConfig(str(tmp_path), use_cpu=True, report_to="wandb").report_to == ["wandb"]


def test_a_precision_is_of_one_run(tmp_path):
    """Not of those that come after it in the process, which 4.x tells by the environment."""
    for changes, expected in (({"bf16": True}, "bf16"), ({}, "no")):
        config = tiny_config(tmp_path, **changes)
        assert DAMTrainer(tiny_model(), sum_reward, config, ROWS).accelerator.mixed_precision == expected
    first, second = tiny_config(tmp_path, bf16=True), tiny_config(tmp_path)
    assert DAMTrainer(tiny_model(), sum_reward, first, ROWS).accelerator.mixed_precision == "bf16"
    with pytest.raises(ValueError, match="mixed_precision"):
        DAMTrainer(tiny_model(), sum_reward, second, ROWS)


def test_a_method_that_is_missing_is_named():
    class Other:
        def _load_best_model(self):
            pass

        _get_output_dir = _save_checkpoint = _load_best_model

    with pytest.raises(ImportError, match=f"builds on _get_train_sampler .* transformers {transformers.__version__}"):
        releases._fitted(Other)


def test_an_older_release_is_refused():
    for release in ("4.49.0", "4.100.1", "5.0.0rc1"):
        releases.check_release(release)
    with pytest.raises(ImportError, match=r"needs transformers 4\.49 or later; 4\.48\.3 is installed"):
        releases.check_release("4.48.3")
    pyproject = (versions.CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    assert versions.oldest(pyproject, "transformers") == ".".join(map(str, releases.OLDEST))
