"""What becomes of the names of TRL's GRPOConfig and GRPOTrainer here: one table, for docs/grpo.md and for messages.

Of TRL 1.9.0. A name that both have means the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["same", "other default", "refused"]


class Entry(NamedTuple):
    """Of one name."""

    kind: Kind
    note: str  # what differs; of a refused name why, and what to do


def _of(kind: Kind, **notes: str) -> dict[str, Entry]:
    return {name: Entry(kind, note) for name, note in notes.items()}


def _alike(kind: Kind, note: str, *names: str) -> dict[str, Entry]:
    return {name: Entry(kind, note) for name in names}


_VLLM = (
    "rollouts fill in masked positions in this process; vLLM decodes from left to right: leave it out. "
    "rollout_batch_size sets how many trajectories share a network call"
)
_NO_ENTROPY = (
    "a bonus of entropy, or a choice of tokens by it, has another optimum than p*: leave it out; a larger beta keeps "
    "the model closer to its base"
)
_NO_RATIO = (
    "the loss has no ratio of new to old policy to bound: leave it out. target_ess and max_tilt bound how far a step "
    "goes, clip the log weights"
)
_FIXED_BASE = (
    "the base defines the optimum, p* proportional to p_base exp(reward / beta): a base that moves has none. Leave it "
    "out; for another target set beta, or start a new run from the trained model"
)
_LAW = (
    "weights are of trajectories drawn from the model's own law; what cuts or bends it in training makes them wrong. "
    "temperature is of both"
)

CONFIG: dict[str, Entry] = {
    # Of all of TRL's trainers
    **_of(
        "same",
        logging_steps="",
        lr_scheduler_kwargs="",
        use_liger_kernel="of transformers.TrainingArguments. The output layer and the loss are fused here without it",
        torch_empty_cache_steps="",
    ),
    **_of(
        "other default",
        bf16="None: True on a GPU that has bfloat16, unless fp16 is set, and False on a CPU, where it is True in TRL",
        gradient_checkpointing="False; True in TRL. A model of your own may have no such thing",
        learning_rate="5e-5, of transformers; 1e-6 in TRL. The loss is a weighted cross-entropy, no policy gradient",
    ),
    # Model
    **_of(
        "same",
        model_init_kwargs="for AutoModelForMaskedLM; dtype float32 unless given. An error where model is no name",
        disable_dropout="in TRL of dropout modules; here also of rates that attention layers keep as numbers",
    ),
    **_of(
        "refused",
        trust_remote_code="which class loads a model with code of its own differs (docs/models.md): load it, and its "
        "tokenizer, with from_pretrained(..., trust_remote_code=True) and pass the objects",
        router_aux_loss_coef="the loss is the matching loss alone; a load-balancing term moves its optimum: "
        "leave it out",
        cast_lm_head_to_fp32="the fused loss is summed in float32 whatever the output layer's dtype: leave it out",
    ),
    # Data
    **_of(
        "same",
        remove_unused_columns="must stay False: other columns go to the reward functions",
        shuffle_dataset="",
        chat_template_kwargs="",
    ),
    **_of(
        "other default",
        max_completion_length="128, drawn by the 64 network calls of diffusion_steps; 256 in TRL. Masks behind a "
        "prompt; a completion ends earlier at a stop token. None is refused",
        num_generations="16; 8 in TRL. Weights are normalised over a group, which below 16 is noisy",
    ),
    **_of(
        "refused",
        num_generations_eval="an evaluation fills in each prompt once: repeat the rows of eval_dataset, of which each "
        "is drawn by itself",
        ds3_gather_for_generation="parameters that ZeRO-3 has divided are gathered layer by layer in rollouts too, "
        "the output layer where it is read: leave it out",
        pad_to_multiple_of="a batch is as long as its longest row: pad input_ids on the left yourself, with "
        "attention_mask 0",
    ),
    # Batches
    **_of(
        "other default",
        per_device_train_batch_size="8 * num_generations, 8 prompts; 8 in TRL. Completions, as there. A process draws "
        "whole groups, so times steps_per_generation, where that is set, it must be a multiple of num_generations in "
        "each process",
        num_iterations="4; 1 in TRL. How often a completion is trained on: in the mean here, as passes draw from a "
        "replay buffer of the last replay_size groups. A rollout costs far more network calls than a pass",
    ),
    **_of(
        "same",
        per_device_eval_batch_size="completions, of which an evaluation draws one for each prompt",
        generation_batch_size="resolved with steps_per_generation; both may be given where they agree",
        steps_per_generation="with num_iterations: a rollout feeds steps_per_generation * num_iterations passes, which "
        "must be whole training steps, a multiple of gradient_accumulation_steps. Unset, gradient_accumulation_steps, "
        "or the least multiple of it that draws whole groups",
    ),
    # Generation
    **_of("same", temperature="of rollouts, model and base; eval_temperature, 0 unless set, of evaluations"),
    **_alike("refused", f"{_LAW}. In evaluations there are eval_top_k and eval_top_p", "top_p", "top_k"),
    **_alike("refused", f"{_LAW}. Leave it out", "min_p", "repetition_penalty"),
    **_of(
        "refused",
        generation_kwargs=f"{_LAW}. For tokens never drawn use suppress_tokens, for ends stop_token_ids, for "
        "evaluations what begins with eval_",
        cache_implementation="block-causal models keep keys and values of what is in front of a block by themselves: "
        "leave it out",
    ),
    **_alike(
        "refused",
        _VLLM,
        "use_vllm",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
    ),
    **_alike(
        "refused",
        "rollouts do not go through transformers' generate: leave it out. rollout_batch_size sets how many "
        "trajectories share a network call",
        "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
        "use_transformers_paged",
    ),
    # Objective
    **_of(
        "other default",
        beta="0.04; 0 in TRL, and refused here. The coefficient of KL(model || base), in units of the reward itself; "
        "in TRL of the reward divided by its group's standard deviation, unless scale_rewards is none",
    ),
    **_alike("refused", _NO_RATIO, "epsilon", "epsilon_high", "delta", "off_policy_mask_threshold"),
    **_alike(
        "refused",
        "a parameter of a loss_type that is not here: leave it out. estimator and normalizer choose the loss",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "vespo_k_pos",
        "vespo_lambda_pos",
        "vespo_k_neg",
        "vespo_lambda_neg",
    ),
    **_of(
        "refused",
        loss_type="the loss is a matching loss: estimator and normalizer choose which",
        importance_sampling_level="weights are always of whole trajectories: leave it out",
        multi_objective_aggregation="reward functions are weighted and added (sum_then_normalize without what "
        "normalises): leave it out, and scale in the functions or by reward_weights",
        scale_rewards="weights are exp(reward / beta): dividing by a group's standard deviation would give each prompt "
        "a beta of its own, and so another optimum. Leave it out; scale the reward or set beta",
        mask_truncated_completions="left out of a matching loss, a completion has weight 0, as with a reward of -inf: "
        "it would be forbidden, not ignored. Return -inf for completions without a stop token to forbid them, or "
        "the reward they shall have",
        use_bias_correction_kl="no KL is estimated in the loss: leave it out",
    ),
    **_of("same", reward_weights=""),
    **_alike("refused", _FIXED_BASE, "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    **_alike(
        "refused",
        _NO_ENTROPY,
        "top_entropy_quantile",
        "entropy_coef",
        "use_adaptive_entropy",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
    ),
    **_of("refused", max_tool_calling_iterations="completions call no tools: leave it out"),
    # Logging
    **_of(
        "same",
        log_completions="those of the last rollout. The weight is shown where TRL shows the advantage. On the terminal "
        "without rich too; to wandb, not to trackio, and not as a parquet file",
        num_completions_to_print="",
        log_unique_prompts="on the terminal too, in TRL not there",
    ),
    **_of(
        "refused",
        log_multimodal="prompts and completions are text or token ids: leave it out",
        log_completions_hub_repo="completions are not uploaded: leave it out; report_to wandb keeps them, and a reward "
        "function sees them all",
    ),
}

TRAINER: dict[str, Entry] = {
    **_of(
        "same",
        model="a name is loaded by AutoModelForMaskedLM; a model with code of its own as an object (docs/models.md)",
        reward_funcs="functions, async ones too, sequence classifiers or their names (with "
        "model_init_kwargs). Text is tokenised for these with their special tokens, in TRL without; "
        "per_device_eval_batch_size of them share a forward pass. Functions are not given log_extra, log_metric and "
        "environments. A completion that all give None for is an error: without a weight it would be forbidden",
        args="",
        train_dataset="also with input_ids, sequences with masks to fill in",
        eval_dataset="",
        processing_class="None is never loaded by name: completions are token ids then",
        reward_processing_classes="",
        callbacks="",
        optimizers="",
        peft_config="the base is the model with its adapter as it was at first",
    ),
    **_of(
        "refused",
        quantization_config="load the model with it: from_pretrained(..., quantization_config=...)",
        tools="completions call no tools: leave it out",
        rollout_func="weights need the law that trajectories were drawn from, which is that of dam.rollout. For loops "
        "of your own there are dam.rollout, dam.adjoint and the operations",
        environment_factory="a completion is drawn without an environment: give what it would tell as columns of the "
        "dataset, which reward functions see",
    ),
}


def refuse(given: Iterable[str], table: Mapping[str, Entry], theirs: str, ours: str) -> None:
    """That no name is one that TRL has and `ours` has not.

    Args:
        given: names of arguments; others than TRL's are passed over.
        table: CONFIG or TRAINER.
        theirs, ours: the classes, for the message.

    Raises:
        TypeError: says of each such name why not, and what to do.
    """
    names = set(given)
    refused = [name for name, entry in table.items() if name in names and entry.kind == "refused"]
    if refused:
        listed = "".join(f"\n  {name}: {table[name].note}" for name in refused)
        raise TypeError(f"{ours} does not take what {theirs} has as{listed}")


def as_markdown(table: Mapping[str, Entry]) -> str:
    """The table as docs/grpo.md has it: refused names of one reason share a row."""
    rows: dict[Any, list[str]] = {}
    for name, entry in table.items():
        rows.setdefault(entry if entry.kind == "refused" else name, []).append(name)
    lines = ["| name | here | |", "| --- | --- | --- |"]
    for names in rows.values():
        kind, note = table[names[0]]
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind} | {note.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
