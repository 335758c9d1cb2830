"""One process of a FlowTrainer's run on several, by `python -m torch.distributed.run -m tests.train.flow_process_run`.

Writes what it ends with to OUTPUT/CASE-RANK.pt. CASE names what the process does; see `main`.
"""

import os
import signal
import sys

import torch

from dam.train import FlowTrainer
from tests.train.flow_tiny import ROWS, Network, direct, near_goal, tiny_config
from tests.train.tiny import logged


class Killed:
    """The reward, in a process that ends at its n-th call."""

    def __init__(self, at):
        self.left = at

    def __call__(self, state, goal, name):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return near_goal(state, goal, name)


def trained(output, *, processes=1, reward=near_goal, resume=None, **changes):
    """A trainer after its run of 5 steps, three from each rollout, on all targets of a process at once."""
    config = tiny_config(
        output, max_steps=5, num_iterations=3, per_device_train_batch_size=10**5, generation_batch_size=4, optim="sgd",
        save_strategy="steps", save_steps=1, ddp_backend="gloo" if processes > 1 else None, **changes,
    )  # fmt: skip
    trainer = FlowTrainer(Network(), reward, config, ROWS, ROWS[:5], shape=(3,))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def told(trainer):
    """What a run ends with."""
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    figures = {"reward_calls": trainer.reward_calls, "logged": logged(trainer)}
    return {"weights": weights, "eval_reward": trainer.evaluate()["eval_reward"], **figures}


def main(output, *cases):
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in cases:
        if case == "whole":
            trainer = trained(f"{output}/whole", processes=processes)
        elif case == "resumed":
            trainer = trained(f"{output}/resumed", processes=processes, resume=f"{output}/whole/checkpoint-2")
        elif case == "refl":
            given = {**direct("refl", per_device_train_batch_size=2), "optim": "sgd", "max_steps": 2}
            config = tiny_config(f"{output}/refl", ddp_backend="gloo", **given)
            trainer = FlowTrainer(Network(), near_goal, config, ROWS, ROWS[:5], shape=(3,))
            trainer.train()
        elif case == "killed":
            # The trial, and the rollout of step 0: then that of step 3.
            reward = Killed(3 if rank == 1 else -1)
            trainer = trained(f"{output}/killed", processes=processes, reward=reward)
        else:
            raise ValueError(case)
        torch.save(told(trainer), f"{output}/{case}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
