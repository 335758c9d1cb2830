"""DAMConfig says what is wrong before any work is done."""

import math

import pytest
from tiny import tiny_config


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
        ({"draw_outcomes": 8, "normalizer": "state"}, 'draw_outcomes .* goes with normalizer "group"'),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **changes)


def test_a_dict_comes_from_a_command_line_as_json(tmp_path):
    assert tiny_config(tmp_path, chat_template_kwargs='{"loud": true}').chat_template_kwargs == {"loud": True}


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
