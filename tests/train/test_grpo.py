"""What was GRPOConfig's and GRPOTrainer's: every name is told of, in the docs and where it is refused."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from tiny import ROWS, sum_reward, tiny_config, tiny_model
from transformers import TrainingArguments

from dam.train import DAMConfig, DAMTrainer, grpo

# Of TRL 1.9.0: fields of GRPOConfig beyond those of TrainingArguments or with a default of their own, and GRPOTrainer's
# arguments.
FIELDS = """
    logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps learning_rate
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 remove_unused_columns
    num_generations num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
    pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs
    chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size beta
    num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
    vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards
    loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
    entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    vllm_importance_sampling_cap
""".split()
ARGUMENTS = """
    model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks optimizers
    quantization_config peft_config tools rollout_func environment_factory
""".split()
PAGE = Path(__file__).parents[2] / "docs" / "grpo.md"
OURS = {each.name: each for each in dataclasses.fields(DAMConfig)}
REFUSED = [name for name, entry in grpo.CONFIG.items() if entry.kind == "refused"]


def test_every_name_is_told_of():
    assert set(FIELDS) <= set(grpo.CONFIG) and len(set(FIELDS)) == 85
    # Beyond these two whose meaning TRL changes.
    assert set(grpo.CONFIG) - set(FIELDS) == {"per_device_train_batch_size", "per_device_eval_batch_size"}
    assert set(ARGUMENTS) == set(grpo.TRAINER)


def test_what_is_not_refused_is_there_and_what_is_refused_is_not():
    for name, entry in grpo.CONFIG.items():
        assert (name in OURS) == (entry.kind != "refused"), name
    taken = inspect.signature(DAMTrainer.__init__).parameters
    for name, entry in grpo.TRAINER.items():
        assert (name in taken) == (entry.kind != "refused"), name
    # In TRL's order, so that positional arguments mean the same.
    positional = [n for n, each in taken.items() if each.kind is each.POSITIONAL_OR_KEYWORD and n != "self"]
    assert positional == ARGUMENTS[: len(positional)] and len(positional) == 9


def test_a_default_is_told_where_it_is_another():
    """Before TRL's, and as it is; of what is derived, as in words."""
    defaults = {
        **{name: each.default for name, each in OURS.items()},
        "per_device_train_batch_size": "8 * num_generations",
        "learning_rate": "5e-5",
    }
    of_transformers = TrainingArguments("unused", use_cpu=True)
    assert of_transformers.learning_rate == 5e-5 and not of_transformers.gradient_checkpointing
    defaults["gradient_checkpointing"] = False
    for name, entry in grpo.CONFIG.items():
        if entry.kind == "other default":
            assert entry.note.startswith(str(defaults[name])) and "in TRL" in entry.note, name


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_of_trl_s_is_refused_with_what_to_do(tmp_path, name):
    with pytest.raises(TypeError) as raised:
        DAMConfig(str(tmp_path), **{name: None})
    message = str(raised.value)
    assert message.startswith("DAMConfig does not take what GRPOConfig has as\n") and f"  {name}: " in message
    assert grpo.CONFIG[name].note in message and len(message.splitlines()) == 2


def test_several_names_are_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"(?s)use_vllm: rollouts fill in masked.*epsilon: the loss has no ratio"):
        DAMConfig(str(tmp_path), beta=0.1, epsilon=0.2, use_vllm=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilom'"):
        DAMConfig(str(tmp_path), epsilom=0.2)

    @dataclasses.dataclass
    class WithEpsilon(DAMConfig):
        epsilon: float = 0.1

    assert WithEpsilon(str(tmp_path), use_cpu=True, epsilon=0.2).epsilon == 0.2
    with pytest.raises(TypeError, match=r"WithEpsilon does not take what GRPOConfig has as\n  use_vllm: "):
        WithEpsilon(str(tmp_path), epsilon=0.2, use_vllm=True)


def test_arguments_of_the_trainer_are_refused_too(tmp_path):
    given = (tiny_model(), sum_reward, tiny_config(tmp_path), ROWS)
    for name in ("quantization_config", "tools", "rollout_func", "environment_factory"):
        with pytest.raises(TypeError, match=f"DAMTrainer does not take what GRPOTrainer has as\n  {name}: "):
            DAMTrainer(*given, **{name: None})
    with pytest.raises(TypeError, match=r"DAMTrainer does not take reward_function$"):
        DAMTrainer(*given, reward_function=None)


@pytest.mark.parametrize("table", ["CONFIG", "TRAINER"])
def test_the_docs_have_the_table(table):
    """As `grpo.as_markdown` makes it."""
    assert grpo.as_markdown(getattr(grpo, table)) in PAGE.read_text(encoding="utf-8")
