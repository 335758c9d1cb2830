"""One process of a run on several that one server draws for: `-m tests.engines.process_run OUTPUT URL`.

Writes what two runs end with to OUTPUT/RANK.pt: one that goes to its end, and one whose server dies on its way.
"""

import functools
import http.client
import json
import os
import sys
from urllib.parse import urlsplit

import torch

from dam.engines import SGLangEngine
from dam.models import as_denoiser
from dam.train import DAMTrainer
from tests.models.standins import SDARForCausalLM
from tests.models.standins.sdar import SDARConfig
from tests.models.standins.trunk import MASK
from tests.train.tiny import sum_reward, tiny_config

ROWS = [{"prompt": [1 + n % 3, 2, 4 + n % 2, 1, 6, 2, 7][: 3 + n % 5]} for n in range(8)]


def model(seed=0):
    torch.manual_seed(seed)
    return SDARForCausalLM(SDARConfig()).eval()


def trainer_of(output, judge=sum_reward, engine=None, processes=1, block_length=4):
    config = tiny_config(
        output, prompts=2 // processes, replay_batch_size=4 // processes, mask_token_id=MASK, diffusion_steps=5,
        max_completion_length=5, whole_blocks=True,
        max_steps=3, num_iterations=1, optim="sgd", learning_rate=0.05, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    denoiser = functools.partial(as_denoiser, block_length=block_length)
    return DAMTrainer(model(), judge, config, ROWS, denoiser=denoiser, rollout_engine=engine)


def misbehave(url, how):
    connection = http.client.HTTPConnection(urlsplit(url).hostname, urlsplit(url).port)
    connection.request("POST", "/misbehave", json.dumps({"how": how}))
    connection.getresponse().read()


class Judge:
    """Has a server go away between two rollouts."""

    def __init__(self, url):
        self.url, self.calls = url, 0

    def __call__(self, **given):
        self.calls += 1
        if self.calls == 1 and int(os.environ.get("RANK", "0")) == 0:
            misbehave(self.url, "die")
        return sum_reward(**given)


def main(output, url):
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine = SGLangEngine(url, f"{output}/weights", block_length=4, timeout=120.0)
    whole = trainer_of(f"{output}/whole", engine=engine, processes=processes)
    whole.train()
    told = {"weights": dict(whole.model.state_dict()), "groups": whole.progress.replay.state_dict()["groups"]}
    broken = trainer_of(f"{output}/broken", Judge(url), engine, processes)
    try:
        broken.train()
    except Exception as error:
        told |= {"error": f"{type(error).__name__}: {error}", "step": broken.state.global_step}
    torch.save(told, f"{output}/{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
