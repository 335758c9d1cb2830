"""One process of `python -m torch.distributed.run -m tests.models.sharded_run OUTPUT`: a head that FSDP2 divided.

Writes to OUTPUT what a rollout and a loss are with the whole model and with it divided in each of several ways.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import BertConfig, BertForMaskedLM

from dam.adjoint import estimator_loss, group_targets
from dam.ctmc import MaskedCTMC
from dam.models import MaskedLM
from dam.rollout import rollout
from tests.architectures import small_sizes

MASK, VOCABULARY = 0, 9
RATE = 0.1  # of steps of plain gradient descent
PROCESS = MaskedCTMC(MASK)


def model(tied):
    torch.manual_seed(0)
    sizes = {**small_sizes(VOCABULARY), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = BertForMaskedLM(BertConfig(**sizes, tie_word_embeddings=tied))
    if not tied:  # before 5.0 the head's bias is tied to another module's all the same
        decoder = network.cls.predictions.decoder
        decoder.bias = torch.nn.Parameter(decoder.bias.detach().clone())
    return network


def seen(network, rank):
    """Draws, losses and gradients of this process's sequences."""
    tokens = torch.tensor([[3, 4 + rank, MASK, MASK]]).repeat(4, 1)
    final = rollout(MaskedLM(network), tokens, PROCESS, seed=1, row_ids=4 * rank + torch.arange(4)).final
    states, weight = tokens[None], torch.tensor([[0.5, 1.0, 2.0, 0.5]])
    loss = estimator_loss(MaskedLM(network), group_targets("posterior", states, final[None], weight, PROCESS), PROCESS)
    loss.backward()
    used = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    gradients = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in used]
    return {"final": final, "loss": loss.detach(), "gradients": gradients}


def main(output):
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    found = {}
    for tied in (False, True):
        whole = seen(model(tied), rank)
        for gradient in whole["gradients"]:  # as DistributedDataParallel and FSDP have it
            dist.all_reduce(gradient)
            gradient /= 2
        found[f"whole {tied}"] = whole
        for own in (False, True):
            if own and tied:
                continue  # FSDP divides the embedding apart from the head then
            for again in (False, True):
                network = model(tied)
                fully_shard(network.bert.encoder.layer[0], mesh=mesh)
                if own:
                    fully_shard(network.cls.predictions.decoder, mesh=mesh)
                fully_shard(network, mesh=mesh, reshard_after_forward=again)
                found[f"own unit {own}, resharded {again}, tied {tied}"] = seen(network, rank)
    other = model(False)
    layer = other.cls.predictions.decoder
    layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    try:
        MaskedLM(other).head()
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, f"{output}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
