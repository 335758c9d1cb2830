"""One process of a run under DeepSpeed: `accelerate launch ... -m tests.train.zero_run OUTPUT CASE ...`.

Saves the model that it ends with to OUTPUT/CASE/saved, and what else it ends with to OUTPUT/CASE-RANK.pt.
"""

import os
import sys

import torch
from peft import LoraConfig

from dam.train import DAMTrainer
from tests.train.process_run import model as untrained
from tests.train.tiny import logged, sum_reward, tiny_config

# Of several lengths and numbers of masks, so that processes need different numbers of network calls.
PROMPTS = [{"input_ids": [1 + n % 3] * (1 + n % 2) + [0] * (2 + n % 4)} for n in range(12)]
ASKED = [{"prompt": [1 + n % 3] * (1 + n % 2)} for n in range(12)]
# Not as many for each process.
HELD_OUT = [{"input_ids": [2, 0, 3, 0, 1, 0, 2][: 3 + n]} for n in range(5)]
LORA = {"r": 2, "target_modules": ["Wqkv", "decoder"], "init_lora_weights": False}
ADAPTER = {"peft_config": LoraConfig(**LORA)}
CASES = {
    "whole": {},
    # Each row ends by itself, and its last blocks take no calls.
    "ended": {"rows": ASKED, "stop_token_ids": [3], "block_length": 1, "max_completion_length": 6, "max_steps": 3},
    "adapted": {"max_steps": 4, "save_steps": 2, **ADAPTER},
    "accumulated": {"max_steps": 2, "gradient_accumulation_steps": 3},
}


def model():
    """One whose predictions differ from place to place, so that rounding does not choose between equal ones."""
    network = untrained()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "attn" in name or "mlp" in name:
                weight *= 8.0
    return network


def trainer_of(output, *, processes=1, rows=PROMPTS, peft_config=None, **changes):
    """Steps of six prompts and six groups, of all processes together."""
    share = 6 // processes // changes.get("gradient_accumulation_steps", 1)
    settings = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "num_iterations": 1, "num_generations": 4,
        "optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "logging_steps": 1, "replay_size": 9,
        "prompts": share, "replay_batch_size": share, "eval_remasking": "confidence", "eval_threshold": 0.3,
        "eval_temperature": 1.0, **changes,
    }  # fmt: skip
    torch.manual_seed(1)  # of adapters
    config = tiny_config(output, **settings)
    return DAMTrainer(model(), sum_reward, config, rows, HELD_OUT, peft_config=peft_config)


def told(trainer):
    """What a run ends with besides weights: the replay buffer and the figures it logged."""
    return {
        "groups": trainer.progress.replay.state_dict()["groups"],
        "logged": logged(trainer),
        "filled_in": torch.from_numpy(trainer.predict(HELD_OUT).predictions),
    }


def ran(output, case, *, resume=None, universal=False, **more):
    """A run of a case; the model that it ends with is in OUTPUT/saved."""
    trainer = trainer_of(output, **more, **CASES[case])
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # nothing so small is kept whole
        config["checkpoint"] = {"load_universal": universal}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{output}/saved")
    return trainer


def main(output, *cases):
    import deepspeed

    # Gloo's collectives instead of DeepSpeed's own between CPUs, which it would compile for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in cases:
        case, _, resumed = name.partition(
            "-"
        )  # by "resumed", or by "universal" from what another number of processes left
        resume = f"{output}/{case}/checkpoint-{CASES[case].get('save_steps', 4)}" if resumed else None
        options = {"processes": processes, "resume": resume, "universal": resumed == "universal"}
        trainer = ran(f"{output}/{name}", case, **options)
        stage = trainer.deepspeed.zero_optimization_stage()
        held = sum(each.numel() for each in trainer.model.parameters())
        torch.save({**told(trainer), "stage": stage, "held": held}, f"{output}/{name}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
