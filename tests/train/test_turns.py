"""Calls of processes that need different numbers of them, in different orders: made by all at once, or none."""

import pytest
import torch
import torch.distributed as dist

from dam.ops._head import Head
from dam.train.turns import in_turns
from tests.ranks import server_of_forks

# Of each process: which denoiser it asks for what.
PLANS = [[(0, "h"), (0, "w"), (0, "h"), (0, "w"), (1, "h"), (1, "w")], [(1, "h"), (1, "w"), (0, "h")], []]


class Divided:
    """A denoiser whose calls need all processes, and tell whether they made the same."""

    def __init__(self, number):
        self.number, self.mine = number, []

    def _made(self, kind):
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, (self.number, kind))
        assert len(set(told)) == 1, told

    def hidden_states(self, tokens, attention_mask=None):
        self._made("h")
        return tokens[..., None].float()

    def head(self):
        self._made("w")
        return Head(torch.full((1, 1), float(self.number)), None)


def process(rank, store, fails, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(PLANS))
    tokens = torch.full((2, 3), rank)
    found = []
    try:
        with in_turns([Divided(0), Divided(1)], tokens, torch.ones_like(tokens)) as denoisers:
            for n, (which, kind) in enumerate(PLANS[rank]):
                if fails and (rank, n) == (1, 2):
                    raise KeyError("lost")
                one = denoisers[which]
                found.append(one.head().weight.item() if kind == "w" else one.hidden_states(tokens + n)[0, 0, 0].item())
    except (KeyError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.full)])
def test_each_process_gets_what_it_asks_for_and_makes_what_others_need(tmp_path, fails):
    """Where one fails between its calls, the others know and end too."""
    context = server_of_forks()
    results = context.Queue()
    started = [context.Process(target=process, args=(n, tmp_path / "store", fails, results)) for n in range(len(PLANS))]
    for one in started:
        one.start()
    found = dict(results.get(timeout=500) for _ in PLANS)
    for one in started:
        one.join(timeout=60)
        assert one.exitcode == 0
    if fails:
        other = "_OtherFailed: process 1 failed in a rollout"
        assert found == {0: other, 1: "KeyError: 'lost'", 2: other}
    else:
        assert found == {0: [0.0, 0.0, 2.0, 0.0, 4.0, 1.0], 1: [1.0, 1.0, 3.0], 2: []}
