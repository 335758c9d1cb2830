"""DAMConfig says what is wrong before any work is done."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from tiny import ROWS, sum_reward, tiny_config, tiny_model

from dam.train import DAMTrainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "last_jump"}, "estimator must be one of .*'last_jump'"),
        ({"normalizer": "batch"}, "normalizer must be one of state, group; got 'batch'"),
        ({"eval_remasking": "likeliest"}, "eval_remasking must be one of random, left-to-right, confidence, entropy"),
        (
            {"eval_threshold": 0.9},
            "eval_threshold goes with eval_remasking confidence, entropy, margin, .* got 'random'",
        ),
        ({"eval_threshold": math.nan, "eval_remasking": "entropy"}, "eval_threshold must be a number; got nan"),
        ({"eval_top_k": 0}, "eval_top_k must be at least 1; got 0"),
        ({"eval_top_p": 0.0}, r"eval_top_p must be in \(0, 1\]; got 0.0"),
        ({"eval_top_p": 1.5}, r"eval_top_p must be in \(0, 1\]; got 1.5"),
        ({"eval_guidance": -1.0}, "eval_guidance must be >= 0 and finite; got -1.0"),
        ({"num_generations": 0}, "num_generations must be at least"),
        ({"num_generations": 1, "target_ess": None}, "num_generations must be at least 2"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"replay_size": 0}, "replay_size must be at least 1"),
        ({"replay_batch_size": 0}, "replay_batch_size must be at least 1"),
        ({"rollout_batch_size": 0}, "rollout_batch_size must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"diffusion_steps": 0}, "diffusion_steps must be at least 1"),
        ({"block_length": 0}, "block_length must be at least 1"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": math.nan}, "beta must be > 0"),
        ({"max_tilt": 0.0}, "max_tilt must be in"),
        ({"max_tilt": 1.5}, "max_tilt must be in"),
        ({"full_tilt_from": 1.5}, r"full_tilt_from must be in \[0, 1\] or None; got 1.5"),
        ({"full_tilt_from": math.nan}, "full_tilt_from must be in"),
        ({"num_replicates": 0}, "num_replicates must be at least 1"),
        ({"num_replicates": 2, "normalizer": "state"}, 'num_replicates goes with normalizer "group"'),
        ({"num_replicates": 2, "estimator": "first_jump_one"}, "num_replicates goes with"),
        ({"num_replicates": 3, "antithetic": True}, "antithetic goes with an even num_replicates"),
        ({"num_replicates": 2, "antithetic": True, "estimator": "first_jump"}, "antithetic goes with"),
        ({"centering": -1.0}, "centering must be >= 0"),
        ({"centering": 1.0, "draw_outcomes": 4}, "draw_outcomes draws in proportion to weights"),
        ({"num_orders": 0}, "num_orders must be at least 1; got 0"),
        ({"order_samples": 9}, r"order_samples must be in \[0, 7\], as many as the model draws of a group; got 9"),
        ({"order_samples": 3, "base_generations": 6}, r"order_samples must be in \[0, 2\]"),
        ({"base_generations": 8}, r"base_generations must be in \[0, num_generations\); got 8"),
        ({"base_generations": -1}, "base_generations must be in"),
        ({"order_samples": -1}, "order_samples must be in"),
        ({"target_ess": 9.0}, r"target_ess must be in \[1, num_generations\]; got 9"),
        ({"target_ess": 0.5}, "target_ess must be in"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"eval_temperature": -1.0}, "eval_temperature must be >= 0 and finite; got -1.0"),
        ({"eval_temperature": math.nan}, "eval_temperature must be >= 0"),
        ({"clip": math.inf}, "clip must be"),
        ({"chat_template_kwargs": "loud"}, "chat_template_kwargs must be a dict; got 'loud'"),
        ({"stop_token_ids": [3, -1]}, r"stop_token_ids must be token ids; got \[3, -1\]"),
        ({"suppress_tokens": [3, -1]}, r"suppress_tokens must be token ids; got \[3, -1\]"),
        ({"draw_outcomes": 0}, "draw_outcomes must be at least 1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\) or None; got 1.0"),
        ({"ema_decay": 0.0}, "ema_decay must be in"),
        ({"model_init_kwargs": "float32"}, "model_init_kwargs must be a dict; got 'float32'"),
        ({"num_completions_to_print": 0}, "num_completions_to_print must be at least 1 or None"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False: a smaller batch would not hold whole"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        (
            {"per_device_train_batch_size": 12, "steps_per_generation": 1},
            r"and must be a multiple of that: a process draws whole groups. Got 12 \* 1",
        ),
        (
            {"per_device_train_batch_size": 4, "steps_per_generation": 2, "replay_batch_size": None},
            "takes whole groups: .* unless replay_batch_size is set .1 is 8 completions.; got 4",
        ),
        ({"generation_batch_size": 24}, "generation_batch_size must be a multiple of .*, 16; got 24"),
        (
            {"generation_batch_size": 32, "steps_per_generation": 1},
            "generation_batch_size 32 and steps_per_generation 1 do not fit: the first would be 16",
        ),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 4},
            r"steps_per_generation \* num_iterations must be a multiple of .*; got 3 \* 2 and 4",
        ),
        ({"draw_outcomes": 8, "normalizer": "state"}, 'draw_outcomes .* goes with normalizer "group"'),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **changes)


def test_a_dict_comes_from_a_command_line_as_json(tmp_path):
    assert tiny_config(tmp_path, chat_template_kwargs='{"loud": true}').chat_template_kwargs == {"loud": True}


@pytest.mark.parametrize(
    ("changes", "prompts", "steps", "groups", "sizes"),
    [
        ({}, 8, 4, 8, (1, 128)),
        ({"num_generations": 24}, 8, 4, 8, (1, 192)),
        ({"gradient_accumulation_steps": 4}, 32, 4, 8, (4, 512)),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8}, 64, 8, 8, (8, 1024)),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, 16, 1, 8, (2, 256)),
        ({"per_device_train_batch_size": 32, "generation_batch_size": 96, "num_iterations": 1}, 6, 3, 2, (3, 96)),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 8, "replay_batch_size": 5}, 2, 32, 5, (8, 32)),
    ],
    ids=str,
)
def test_batch_sizes_count_completions(tmp_path, changes, prompts, steps, groups, sizes):
    """As in TRL: a completion is trained on num_iterations times in the mean, where replay_batch_size is not set."""
    from dam.train import DAMConfig

    config = DAMConfig(str(tmp_path), use_cpu=True, **changes)
    assert (config.prompts_per_rollout, config.steps_per_rollout, config.replay_batch_size) == (prompts, steps, groups)
    assert (config.steps_per_generation, config.generation_batch_size) == sizes
    trained_on = groups * config.gradient_accumulation_steps * steps / prompts
    assert trained_on == config.num_iterations or "replay_batch_size" in changes
    # What was derived may be given again.
    again = DAMConfig(
        str(tmp_path),
        use_cpu=True,
        **changes | dict(zip(("steps_per_generation", "generation_batch_size"), sizes, strict=True)),
    )
    assert again.prompts_per_rollout == prompts


def test_mixed_precision_is_bfloat16_on_a_gpu_that_has_it(tmp_path, monkeypatch):
    from dam.train import DAMConfig, arguments

    for available in (True, False):
        monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda available=available: available)
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        assert DAMConfig(str(tmp_path)).bf16 is available
        assert DAMConfig(str(tmp_path), use_cpu=True).bf16 is False
        assert DAMConfig(str(tmp_path), bf16=False).bf16 is False
        assert DAMConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True
        assert DAMConfig(str(tmp_path), fp16=True).bf16 is False


def test_a_config_is_copied(tmp_path):
    config = tiny_config(tmp_path, beta=0.5)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.beta == 0.5 and other.to_dict() == config.to_dict()


def test_the_defaults_are_valid(tmp_path):
    from dam.train import DAMConfig

    config = DAMConfig(output_dir=str(tmp_path))
    assert config.num_generations >= 16  # below, the normaliser is unreliable
    assert config.remove_unused_columns is False


def test_limits_of_a_step_let_go(tmp_path):
    """Linear until full_tilt_from of the run is done, then none; as given with None."""
    config = tiny_config(tmp_path, max_tilt=0.2, target_ess=5.0, full_tilt_from=0.5)
    assert [config.step_limits(done) for done in (0.0, 0.25, 0.5, 1.0)] == [
        (5.0, 0.2),
        (3.0, pytest.approx(0.6)),
        (None, 1),
        (None, 1),
    ]
    config = tiny_config(tmp_path, max_tilt=0.2, target_ess=None, full_tilt_from=1.0)
    assert config.step_limits(0.5) == (None, pytest.approx(0.6))
    config = tiny_config(tmp_path, max_tilt=0.2, target_ess=5.0, full_tilt_from=None)
    assert config.step_limits(0.9) == (5.0, 0.2)
    assert tiny_config(tmp_path, full_tilt_from=0.0).step_limits(0.0) == (None, 1.0)


def test_the_defaults_end_at_the_optimum(tmp_path):
    from dam.train import DAMConfig

    config = DAMConfig(output_dir=str(tmp_path))
    assert config.step_limits(1.0) == (None, 1.0) and config.leave_one_out and config.num_orders == 1


@pytest.mark.parametrize(
    ("changes", "steps", "prompts"),
    [
        ({}, 1, 2),
        ({"per_device_train_batch_size": 2}, 4, 1),
        ({"per_device_train_batch_size": 12}, 2, 3),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, 4, 3),
    ],
)
def test_a_rollout_is_of_the_fewest_passes_that_draw_whole_groups(tmp_path, changes, steps, prompts):
    """Of 8 completions, unless told; and it comes between two training steps."""
    config = tiny_config(tmp_path, **changes)
    assert (config.steps_per_generation, config.prompts_per_rollout) == (steps, prompts)
    assert config.generation_batch_size == 8 * prompts


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is memory to pin for")
def test_nothing_is_pinned_where_there_is_no_accelerator(tmp_path):
    """Whether a CPU was asked for or is all there is: torch's loaders would warn at each start."""
    config = tiny_config(tmp_path, use_cpu=False, max_steps=1)
    assert not config.dataloader_pin_memory and not tiny_config(tmp_path).dataloader_pin_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory")
        DAMTrainer(tiny_model(), sum_reward, config, ROWS).train()
