"""One process of `python -m torch.distributed.run -m tests.models.zero_run OUTPUT [NAME ...]`: heads in parts.

Writes to OUTPUT what rollouts, losses and updates are with a model that DeepSpeed has not touched and under its stages.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from transformers import EsmConfig, EsmForMaskedLM

from dam.adjoint import estimator_loss, group_targets
from dam.ctmc import MaskedCTMC
from dam.engines import served_parameters
from dam.models import MaskedLM
from dam.models.sharding import shape_of, whole
from dam.rollout import rollout
from tests.architectures import small_sizes
from tests.models.sharded_run import MASK, RATE, VOCABULARY, model

PROCESS = MaskedCTMC(MASK)
# Persistent parameters are kept whole; a reuse distance of 0 lets go of each after its use.
DIVIDED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
KEPT = {"stage3_param_persistence_threshold": 10**6}


def without_compiling():
    """Gloo's collectives instead of DeepSpeed's own between CPUs, which it would compile for half a minute."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_of(network, stage, **zero):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 500, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD([each for each in network.parameters() if each.requires_grad], lr=RATE)
    return deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]


def with_adapter(network):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["query", "decoder"], init_lora_weights=False, use_dora=True)
    return get_peft_model(network, config)


def with_outside_bias():
    """ESM's, whose bias is no part of the output layer."""
    torch.manual_seed(0)
    sizes = {**small_sizes(VOCABULARY), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = EsmForMaskedLM(EsmConfig(**sizes, mask_token_id=MASK, token_dropout=False))
    torch.nn.init.normal_(network.lm_head.bias)
    return network


NETWORKS = {
    "own": lambda: model(False),
    "tied": lambda: model(True),
    "adapted": lambda: with_adapter(model(False)),
    "outside bias": with_outside_bias,
}


def loss_of(network, rank, final):
    states, weight = torch.tensor([[3, 4 + rank, MASK, MASK]] * 4)[None], torch.tensor([[0.5, 1.0, 2.0, 0.5]])
    targets = group_targets("posterior", states, final[None], weight, PROCESS)
    return estimator_loss(MaskedLM(network), targets, PROCESS)


def seen(network, rank, update):
    """Draws, then losses of three steps, in between of which rollouts are drawn, and the weights that come of them."""
    losses = []
    for step in range(3):
        tokens = torch.tensor([[3, 4 + rank, MASK, MASK]]).repeat(4, 1)
        final = rollout(MaskedLM(network), tokens, PROCESS, seed=step, row_ids=4 * rank + torch.arange(4)).final
        loss = loss_of(network, rank, final)
        losses.append(loss.detach().clone())
        update(loss)
    return {"final": final, "losses": torch.stack(losses)}


def plain(network, rank):
    trained = [each for each in network.parameters() if each.requires_grad]

    def update(loss):
        for each, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if gradient is not None:
                dist.all_reduce(gradient)
                each.data -= RATE / dist.get_world_size() * gradient

    return {**seen(network, rank, update), "weights": {n: p.detach().clone() for n, p in network.named_parameters()}}


def divided(network, rank, stage, **zero):
    engine = engine_of(network, stage, **zero)

    def update(loss):
        engine.backward(loss)
        engine.step()

    found = seen(engine, rank, update)
    parameters = dict(network.named_parameters())
    here = sum(each.numel() for each in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        weights = {name: each.detach().clone() for name, each in parameters.items()}
    assert all(shape_of(parameters[name]) == weight.shape for name, weight in weights.items())
    if not hasattr(network, "peft_config"):  # what an engine that serves rollouts is sent
        sent = dict(served_parameters(network))
        assert sent.keys() == weights.keys() and all(torch.equal(sent[name], weights[name]) for name in sent)
    elif stage == 3:
        try:
            list(served_parameters(network))
        except ValueError as error:
            assert "the adapter's factors are divided by DeepSpeed's ZeRO-3" in str(error)
        else:
            raise AssertionError("an adapter that is divided was sent")
    engine.destroy()
    return {**found, "weights": weights, "here": here}


def read_alone(network):
    """A step down half the square of a head's weight that no forward pass has used; what was and what is."""
    weight = network.get_output_embeddings().weight
    before = weight.detach().clone()
    engine = engine_of(network, 3, **DIVIDED)
    engine.backward(0.5 * whole(weight).square().sum())
    assert weight.numel() == 0
    engine.step()
    with deepspeed.zero.GatheredParameters([weight]):
        after = weight.detach().clone()
    engine.destroy()
    return {"before": before, "after": after}


def main(output, names=("own", "tied")):
    """Of some of the networks; in more ways of all."""
    without_compiling()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {}
    for name in names:
        make = NETWORKS[name]
        found[name] = {"plain": plain(make(), rank), "stage 3": divided(make(), rank, 3, **DIVIDED)}
        if name == "own" and len(names) == len(NETWORKS):
            found[name] |= {f"stage {stage}": divided(make(), rank, stage) for stage in (1, 2)}
            found[name]["stage 3, kept"] = divided(make(), rank, 3, **KEPT)
            found[name]["stage 3, prefetched"] = divided(make(), rank, 3, stage3_param_persistence_threshold=0)
    found["alone"] = read_alone(model(False))
    torch.save(found, f"{output}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *([sys.argv[2:]] if sys.argv[2:] else []))
