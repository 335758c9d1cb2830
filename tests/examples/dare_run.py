"""One of two ranks of tests.ranks, `python -m tests.examples.dare_run OUTPUT`: the recipe under FSDP2.

Writes to OUTPUT what a rollout, its log-probabilities and an update are with two of the four prompts in each process.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.examples import test_dare as tests
from tests.examples.dare_interfaces import DataProto, recipe
from tests.ranks import joined
from tests.train.tiny import rotary_model


def divided():
    model = rotary_model()
    fully_shard(model.model.layers[0])
    return fully_shard(model)


def main(output):
    (rank, _), dare = joined(output), recipe(pytest.MonkeyPatch())
    rows = slice(2 * rank, 2 * rank + 2)
    given = {name: value[rows] for name, value in tests.prompts().batch.items()}
    model, found = divided(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before a forward pass leaves the root's whole
    torch.manual_seed(0)
    engine = dare.rollout.DAMRollout(model, tests.rollout_config(max_num_batched_tokens=24), tests.Tokenizer())
    batch = engine.generate_sequences(DataProto.from_dict(given))
    batch.meta_info |= {"micro_batch_size": 3, "use_dynamic_bsz": False}
    found |= {name: batch.batch[name] for name in ("responses", "unmask_call")}
    # As DARE's workers have it: sizes of this process.
    config = tests.actor_config(ppo_mini_batch_size=6, ppo_micro_batch_size_per_gpu=4)
    actor = dare.actor.DLLMDataParallelPPOActor(config, model, optimizer)
    _, found["old_log_probs"], _ = actor.compute_log_prob(batch)
    batch.batch["path_weight"] = torch.linspace(0.2, 2.0, 12)[6 * rank : 6 * rank + 6]
    torch.manual_seed(7)
    found["metrics"] = actor.update_policy(batch)
    found["parameters"] = {name: value.full_tensor().detach() for name, value in model.named_parameters()}
    torch.save(found, output / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
