#!/usr/bin/env bash
# Discrete Adjoint Matching of LLaDA-8B-Instruct in DARE, on one node or on all nodes of a Ray cluster that runs already.
#
# Goes to recipe/llada/ of a checkout of DARE, and is started in its root (README.md beside it in dam's examples/dare):
#
#     bash recipe/llada/run_dam_llada_8b_instruct.sh --task math [--model_path PATH] [--nnodes N] [hydra.key=value ...]
#
# Not run here: all of it, but for the shell's own reading of it. The keys are those of DARE at commit 83ae8a3. Settings
# of the method are DAMConfig's defaults (docs of dam), not tuned for this model; those of size are guesses for 8 x 80 GB.
set -euo pipefail

task="" model_path=models/LLaDA-8B-Instruct nnodes=1 rest=()
while (($#)); do
    case "$1" in
        --task) task="$2"; shift 2 ;;
        --model_path) model_path="$2"; shift 2 ;;
        --nnodes) nnodes="$2"; shift 2 ;;
        *=*) rest+=("$1"); shift ;;
        *) echo "unknown argument $1: --task, --model_path, --nnodes or hydra.key=value" >&2; exit 2 ;;
    esac
done

data=data/preprocessed/rl
case "$task" in
    math)
        train="['$data/train/math_1.parquet','$data/train/gsm8k_1.parquet']"
        test="['$data/test/math500_1.parquet','$data/test/gsm8k_1.parquet']"
        prompt=512 response=512 ;;
    countdown | sudoku)
        train="['$data/train/$task-n20000_1.parquet']" test="['$data/test/${task}_1.parquet']"
        prompt=512 response=256 ;;
    *) echo "--task must be math, countdown or sudoku; got '$task'" >&2; exit 2 ;;
esac

gpus=${GPUS_PER_NODE:-8}
prompts=${PROMPTS:-16}          # of a step; prompts * responses must be a multiple of all GPUs
responses=${RESPONSES:-16}      # K of each prompt: below 16 the normaliser is unreliable
steps=${STEPS:-$((response / 2))} # network calls of a rollout; as many as tokens, in one block, is the exact chain
block=${BLOCK:-32}              # filled from left to right; as long as the response for one block
beta=${BETA:-0.04}              # min E[-reward] + beta KL(model || base)

export TORCHDYNAMO_DISABLE=1 HYDRA_FULL_ERROR=1

python3 -m verl.trainer.dllm_main_ppo \
    +algorithm.name=dam \
    +algorithm.dam.beta="$beta" \
    +actor_rollout_ref.algorithm.name=dam \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    data.train_files="$train" \
    data.val_files="$test" \
    data.train_batch_size="$prompts" \
    data.val_batch_size=64 \
    data.max_prompt_length="$prompt" \
    data.max_response_length="$response" \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    data.trust_remote_code=True \
    +actor_rollout_ref.model.name=llada \
    actor_rollout_ref.model.path="$model_path" \
    actor_rollout_ref.model.trust_remote_code=True \
    +actor_rollout_ref.model.attn_implementation=flash_attention_2 \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=False \
    actor_rollout_ref.actor.strategy=fsdp2 \
    +actor_rollout_ref.actor.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[LLaDALlamaBlock] \
    actor_rollout_ref.actor.optim.lr=5e-7 \
    actor_rollout_ref.actor.optim.weight_decay=0.01 \
    actor_rollout_ref.actor.ppo_epochs=1 \
    actor_rollout_ref.actor.ppo_mini_batch_size="$prompts" \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.actor.use_dynamic_bsz=False \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=1 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.entropy_coeff=0.0 \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.name=hf \
    actor_rollout_ref.rollout.n="$responses" \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.max_num_batched_tokens=11000 \
    +actor_rollout_ref.rollout.use_cache=False \
    +actor_rollout_ref.rollout.num_diffusion_steps="$steps" \
    +actor_rollout_ref.rollout.block_length="$block" \
    +actor_rollout_ref.rollout.cfg_scale=0.0 \
    +actor_rollout_ref.rollout.stop_token_ids=[126081,126348] \
    actor_rollout_ref.rollout.val_kwargs.n=1 \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.0 \
    +actor_rollout_ref.rollout.val_kwargs.num_diffusion_steps="$response" \
    reward_model.reward_manager=dllm \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=False \
    +reward_model.reward_kwargs.max_resp_len="$response" \
    custom_reward_function.path=verl/utils/reward_score/__init__.py \
    custom_reward_function.name=dllm_rm \
    trainer.n_gpus_per_node="$gpus" \
    trainer.nnodes="$nnodes" \
    trainer.critic_warmup=0 \
    trainer.logger=[console] \
    trainer.project_name=dam \
    trainer.experiment_name="llada-$task" \
    trainer.default_local_dir="ckpts/dam/llada-$task" \
    trainer.val_before_train=False \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.total_epochs=1 \
    "${rest[@]}"
