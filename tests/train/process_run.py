"""One process of a run on several, by `python -m torch.distributed.run -m tests.train.process_run OUTPUT CASE ...`.

Writes what it ends with to OUTPUT/CASE-RANK.pt. CASE names what the process does; see `main`.
"""

import functools
import os
import signal
import sys

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from dam.train import DAMTrainer
from tests.architectures import small_sizes
from tests.hostile import lossy
from tests.train.tiny import ROWS, VOCABULARY, logged, sum_reward, tiny_config

PROMPTS = [{**row, "input_ids": [1, *row["input_ids"]] if n % 2 else row["input_ids"]} for n, row in enumerate(ROWS)]
LOSSY = {"reward_workers": 1, "max_reward_failures": 0.9}
HELD_OUT = [{"input_ids": [2, 0, 0, 0]}] * 5  # not as many for each process


def model():
    """Of rotary positions, to which padding is nothing: how much a prompt gets depends on the others of its process."""
    torch.manual_seed(0)
    config = ModernBertConfig(**small_sizes(VOCABULARY), cls_token_id=None, sep_token_id=None)
    return ModernBertForMaskedLM(config)


class Judge:
    """Fails in one process, at a call, or takes the process with it."""

    def __init__(self, fails_at=None, kills=False):
        self.fails_at, self.kills, self.calls = fails_at, kills, 0

    def __call__(self, **arguments):
        self.calls += 1
        if self.calls == self.fails_at:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("the judge is away")
        return sum_reward(**arguments)


class FailsToRead:
    """Rows of which one cannot be read in one process, in the second epoch."""

    def __init__(self, fails):
        self.fails, self.left = fails, 2 * len(PROMPTS) // 2

    def __len__(self):
        return len(PROMPTS)

    def __getitem__(self, index):
        self.left -= 1
        if self.fails and self.left < 0:
            raise OSError("the disk is gone")
        return PROMPTS[index]


def trained(output, *, judge=None, processes=1, resume=None, rows=PROMPTS, **changes):
    """A trainer after its run: 8 steps into the second epoch, of 4 prompts and 4 groups each."""
    per_process = {"prompts": 4 // processes, "replay_batch_size": 4 // processes}
    config = tiny_config(
        output, max_steps=6, save_strategy="steps", save_steps=2, num_iterations=1, optim="sgd", learning_rate=0.1,
        eval_temperature=1.0, logging_steps=1, ddp_backend="gloo" if processes > 1 else None, replay_size=6,
        **per_process, **changes,
    )  # fmt: skip
    trainer = DAMTrainer(model(), judge or Judge(), config, rows, HELD_OUT)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def told(trainer):
    """What a run ends with: weights, the replay buffer and the figures it logged."""
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"weights": weights, **told_besides(trainer)}


def told_besides(trainer):
    """All that but the weights."""
    return {
        "groups": trainer.progress.replay.state_dict()["groups"],
        "reward_calls": trainer.reward_calls,
        "logged": logged(trainer),
        "eval_reward": trainer.evaluate()["eval_reward"],
    }


def main(output, *cases):
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for case in cases:
        if case == "whole":
            trainer = trained(f"{output}/whole", processes=processes)
        elif case == "resumed":
            trainer = trained(f"{output}/resumed", processes=processes, resume=f"{output}/whole/checkpoint-2")
        elif case == "lossy":
            trainer = trained(f"{output}/lossy", processes=processes, judge=lossy, **LOSSY)
        elif case == "too_lossy":
            judge = functools.partial(lossy, spare=rank == 0)  # only the other has something to keep
            trainer = trained(f"{output}/too_lossy", processes=processes, judge=judge, reward_workers=1)
        elif case == "broken":
            trainer = trained(f"{output}/broken", processes=processes, judge=Judge(3 if rank == 1 else None))
        elif case == "killed":
            trainer = trained(
                f"{output}/killed", processes=processes, judge=Judge(3 if rank == 1 else None, kills=True)
            )
        elif case == "unread":
            trainer = trained(f"{output}/unread", processes=processes, rows=FailsToRead(rank == 1))
        else:
            raise ValueError(case)
        torch.save(told(trainer), f"{output}/{case}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
