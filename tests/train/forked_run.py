"""Runs on several processes, by `python -m tests.train.forked_run OUTPUT CASE ...`: forks of it.

Nothing but the runs themselves ends a process when another fails. Each writes what it ends with to
OUTPUT/CASE-RANK.pt and what it prints to OUTPUT/CASE-RANK.txt; OUTPUT/ended.json has exit statuses, and seconds since
one has failed.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
import traceback

import torch
import torch._dynamo
from peft import LoraConfig

from dam.train import DAMTrainer
from tests.ranks import free_port
from tests.train.process_run import model, told_besides
from tests.train.tiny import sum_reward, tiny_config

# Of other numbers of masks, so that trajectories take other numbers of network calls, and of other lengths.
ROWS = [{"input_ids": [1 + n % 3] * (1 + n % 2) + [0] * (1 + n % 4), "name": n} for n in range(24)]
PROMPTS = [{"prompt": [1 + n % 3] * (1 + n % 2), "name": n} for n in range(24)]
GROUPS = 6  # of a step, which 1, 2 and 3 processes share
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["Wqkv", "Wo", "Wi"]}


class Judge:
    """sum_reward, that knows the prompts it was called for, and does something at a call."""

    def __init__(self, at=None, does=None):
        self.at, self.does, self.seen, self.calls = at, does, [], 0

    def __call__(self, name, **arguments):
        self.calls += 1
        if self.calls == self.at:
            self.does()
        self.seen += name
        return sum_reward(**arguments)


def noted(output, case, does=None):
    """Notes when a process fails, and lets it."""
    with open(f"{output}/{case}.failed", "w") as file:
        file.write(str(time.time()))
    if does is not None:
        does()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def breaks(network, at, notes):
    """Raises in the forward pass of the `at`-th training step."""
    calls = []

    def hook(*_):
        calls.extend([1] if torch.is_grad_enabled() and network.training else [])
        if len(calls) == at:
            notes()
            raise ArithmeticError("the model is ill")

    network.register_forward_pre_hook(hook)


def trainer_of(output, processes=1, *, rows=ROWS, judge=None, network=None, lora=False, **changes):
    values = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_iterations": 1,
        "optim": "adamw_torch",
        "eval_temperature": 1.0,
        "logging_steps": 1,
        "ddp_backend": "gloo" if processes > 1 else None,
        "replay_size": 2 * GROUPS,
        "replay_batch_size": GROUPS // processes,
    } | changes
    config = tiny_config(output, prompts=GROUPS // processes, **values)
    adapter = LoraConfig(**LORA) if lora else None
    return DAMTrainer(network or model(), judge or Judge(), config, rows, ROWS[:5], peft_config=adapter)


def by_paths(processes=1):
    """Arguments of a run whose rows end early, and that trains at single states of their paths."""
    blocks = {"stop_token_ids": [4, 5], "max_completion_length": 4, "block_length": 2}
    return {"rows": PROMPTS, **blocks, "draw_outcomes": 24 // processes}


def whole(parameters):
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in parameters}


def ran(output, processes=1, resume=None, **given):
    """What a run ends with, and the model that it saves."""
    judge = Judge()
    trainer = trainer_of(output, processes, judge=judge, **given)
    trainer.train(resume_from_checkpoint=resume)
    seen, replayed = judge.seen, len(judge.seen)
    trainer.save_model(f"{output}/model")
    weights = {name: each.detach() for name, each in whole(trainer.model.named_parameters()).items()}
    found = {"weights": weights, **told_besides(trainer)}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found | {"seen": seen[:replayed], "class": type(trainer.model).__name__, "graphs": graphs}


def settings(case):
    """Name, kind and number of processes of KIND-NUMBER[-NAME]."""
    kind, number, *name = case.split("-", 2)
    return kind, int(number), name[0] if name else ""


def work(output, case, rank):
    _, processes, name = settings(case)
    run = functools.partial(ran, f"{output}/{case}", processes)
    torch.manual_seed(rank)  # what a process draws by itself, such as an adapter's parameters, is its own
    if name == "lora":
        return run(lora=True)
    if name.startswith("from-"):
        return run(resume=f"{output}/{name[5:]}/checkpoint-3", lora="lora" in name)
    fails = rank == 1
    notes, dies = (functools.partial(noted, output, case, does) for does in (None, killed))
    if name == "killed":
        return run_with(output, case, judge=Judge(5, dies) if fails else None)
    if name == "ill":
        network = model()
        if fails:
            breaks(network, 5, notes)
        return run_with(output, case, network=network)
    if name == "rows":
        return run_with(output, case, rows=ROWS[:-1] if fails else ROWS)
    if name == "shuffled":
        return run_with(output, case, rows=ROWS[::-1] if fails else ROWS)
    if name == "arguments":
        return run_with(output, case, seed=43 if fails else 42, beta=0.2 if fails else 0.1)
    if name == "early":  # before it trains
        trainer = trainer_of(f"{output}/{case}", processes)
        if fails:
            notes()
            raise ValueError("no such file")
        trainer.train()
    if name == "busy":  # with something that is no collective
        return run_with(output, case, judge=Judge(5, dies if fails else functools.partial(time.sleep, 60)))
    if name == "paths":
        return run(**by_paths(processes))
    if name == "compiled":
        return run(torch_compile=True, torch_compile_backend="aot_eager")
    assert not name, case
    return run()


def run_with(output, case, **given):
    trainer_of(f"{output}/{case}", settings(case)[1], **given).train()
    return {}


def process(output, case, rank, port):
    """A fork's life."""
    kind, processes, _ = settings(case)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= FSDP if kind == "fsdp" else {}
    if processes == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    with open(f"{output}/{case}-{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        torch.save(work(output, case, rank), f"{output}/{case}-{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(output, *cases):
    torch.set_num_threads(1)
    ended = {}
    for case in cases:
        port, start, children = free_port(), time.time(), []
        for rank in range(settings(case)[1]):
            child = os.fork()
            if child == 0:
                process(output, case, rank, port)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        # Where none notes it, as where processes disagree, since they began.
        with contextlib.suppress(FileNotFoundError), open(f"{output}/{case}.failed") as file:
            start = float(file.read())
        ended[case] = {"statuses": statuses, "seconds": time.time() - start}
    with open(f"{output}/ended.json", "w") as file:
        json.dump(ended, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
