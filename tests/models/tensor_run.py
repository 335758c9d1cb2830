"""One rank of a model whose output layer tensor parallelism divides, as `tests.ranks` starts them.

Writes what a rollout, a loss and gradients are with the whole layer and with that, and what is refused.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dam.decoding import Decoding
from dam.models import MaskedLM
from dam.rollout import rollout
from tests.models.sharded_run import MASK, PROCESS, VOCABULARY, model, seen
from tests.ranks import joined


def divided(count, plan):
    network = model(False)
    parallelize_module(network.cls.predictions, init_device_mesh("cpu", (count,)), {"decoder": plan})
    return network


def refusals(count):
    tokens = torch.tensor([[3, 4, MASK, MASK]])
    adapted = divided(count, ColwiseParallel(output_layouts=Replicate()))
    adapted.cls.predictions.decoder.base_layer = torch.nn.Identity()
    by_columns = divided(count, RowwiseParallel(output_layouts=Replicate()))
    right = MaskedLM(divided(count, ColwiseParallel(output_layouts=Replicate())))
    for call, message in (
        (MaskedLM(adapted).head, "leave that layer out of its target_modules"),
        (MaskedLM(by_columns).head, "not by rows of the vocabulary: plan that layer as ColwiseParallel"),
        (lambda: rollout(right, tokens, PROCESS, seed=1, decoding=Decoding(top_k=2)), "look at all logits"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def main(folder):
    rank, count = joined(folder)
    found = {"whole": seen(model(False), 0)}
    # What the layer gives may be brought together or not.
    for name, output in (("gathered", Replicate()), ("divided", Shard(-1))):
        network = divided(count, ColwiseParallel(output_layouts=output))
        found[name] = seen(network, 0)
        weight = MaskedLM(network).head().weight
        assert isinstance(weight, DTensor) and weight.to_local().shape[0] <= -(-VOCABULARY // count)
        assert isinstance(network.get_output_embeddings().weight.grad, DTensor)
    refusals(count)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
