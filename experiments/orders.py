"""Where runs of DAMTrainer end whose base is a small network: its conditionals are not those of one joint law.

A random BERT over few positions and tokens, a random reward; all laws by enumeration of outcomes and orders. Each case
says what may keep a run from p*: the trainer with its defaults or without them, with a reward of zero, with four times
the trajectories, in training too, and steps of 5e-3 in place of 2e-3; and without rollouts, what the same optimiser
leaves of outcomes of p* itself, drawn or all of them.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from transformers.trainer_callback import PrinterCallback

from dam.adjoint import MatchingTargets, estimator_loss, group_targets
from dam.ctmc import MaskedCTMC, enumeration
from dam.models.denoiser import MaskedLM
from dam.train import DAMConfig, DAMTrainer
from experiments.tables import kl, path_log_prob

POSITIONS, TOKENS = 3, 5
PROCESS = MaskedCTMC(TOKENS)
BETA, REWARD_SCALE = 0.5, 0.7
LEARNING_RATE = 2e-3
SIZES = {"num_generations": 16, "per_device_train_batch_size": 8 * 16, "replay_batch_size": 32}  # 8 prompts a rollout

MORE = {
    "per_device_train_batch_size": 32 * 16,
    "replay_size": 2048,
    "replay_batch_size": 128,
    "learning_rate": 5e-3,
}
NO_REWARD = "no reward"
TRAINED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nothing drawn by the base": {"base_generations": 0},
    "short steps, weights of mean 1": {"full_tilt_from": None, "leave_one_out": False, "base_generations": 0},
    NO_REWARD: {},
    "four times the trajectories": MORE,
    f"{NO_REWARD}, four times the trajectories": MORE,
}
DRAWN, ALL = "outcomes of p*", "outcomes of p*, all of them"
CASES = (*TRAINED, DRAWN, ALL)
TABLE_STEPS = (0.5, 0.2, 0.05)


def power_mean(paths: Tensor, score: Tensor, h: float) -> Tensor:
    """The law [V^N] that steps h end at, of paths [N!, V^N] of the base and r / beta [V^N]."""
    return ((paths * h).logsumexp(dim=0) / h + score).softmax(dim=0)


def of_table(seed: int, positions: int = 3, tokens: int = 4) -> dict[str, Any]:
    """KL from p* of where steps h end, of a table of random conditionals, with a random reward and without one."""
    generator = torch.Generator().manual_seed(seed)
    size = ((tokens + 1) ** positions, positions, tokens + 1)
    logits = torch.randn(size, generator=generator, dtype=torch.float64)[..., :tokens]
    paths = path_log_prob(logits.log_softmax(dim=2), tokens)
    reward = torch.randn(tokens**positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    away = {
        name: {h: kl(power_mean(paths, score, 1.0), power_mean(paths, score, h)) for h in TABLE_STEPS}
        for name, score in (("reward", reward / BETA), ("no_reward", 0 * reward))
    }
    variance = paths.var(dim=0, unbiased=False) @ paths.exp().mean(dim=0)
    return {"seed": seed, "order_variance": float(variance), **away}


def network_of(seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=TOKENS + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.5,
        )
    )


@torch.no_grad()
def paths_of(network: BertForMaskedLM) -> Tensor:
    logits = network.eval()(input_ids=enumeration.states(TOKENS + 1, POSITIONS)).logits[..., :TOKENS]
    return path_log_prob(logits.double().log_softmax(dim=2), TOKENS)


def run(steps: int, name: str, seed: int) -> dict[str, Any]:
    """KL(p* || p_u) and how far E[r] is off after so many steps of a case."""
    network = network_of(seed)
    base = paths_of(network)
    reward = REWARD_SCALE * torch.randn(
        base.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    reward = 0 * reward if name.startswith(NO_REWARD) else reward
    optimum = power_mean(base, reward / BETA, 1.0)
    told = trained(network, reward, steps, seed, TRAINED[name]) if name in TRAINED else {}
    if not told:
        fitted(network, optimum, steps, seed, every=name == ALL)
    law = paths_of(network).exp().mean(dim=0)
    return {"kl": kl(optimum, law), "reward_off": float((law - optimum) @ reward), **told}


def trained(
    model: Any,
    reward: Tensor,
    steps: int,
    seed: int,
    options: dict[str, Any],
    *,
    positions: int = POSITIONS,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """By DAMTrainer, with a reward [V^N] of each outcome; what it logged last, since its last rollout."""

    def look_up(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return reward[enumeration.index_of(torch.tensor(completion_ids), tokens)].tolist()

    with tempfile.TemporaryDirectory() as folder:
        config = DAMConfig(
            folder,
            beta=BETA,
            max_steps=steps,
            mask_token_id=tokens,
            seed=seed,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **{"learning_rate": LEARNING_RATE, **SIZES, **options},
        )
        trainer = DAMTrainer(model, look_up, config, [{"input_ids": [tokens] * positions}] * 64)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    last = [entry for entry in trainer.state.log_history if "kl_path" in entry][-1]
    return {name: last[name] for name in ("kl_path", "kl_outcome", "order_variance", "ess", "tilt") if name in last}


def fitted(network: BertForMaskedLM, law: Tensor, steps: int, seed: int, *, every: bool) -> None:
    """By the trainer's loss and optimiser on outcomes of a law, of weight 1: as many as it draws, or all of them."""
    generator = torch.Generator().manual_seed(seed)
    outcomes, config = enumeration.states(TOKENS, POSITIONS), DAMConfig("unused", use_cpu=True, **SIZES)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    kept = torch.zeros(0, config.num_generations, dtype=torch.int64)
    whole = _at_every_state(law)
    for step in range(steps):
        targets = whole
        if not every:
            if step % config.steps_per_rollout == 0:
                size = (config.prompts_per_rollout, config.num_generations)
                drawn = torch.multinomial(law, math.prod(size), True, generator=generator).view(size)
                kept = torch.cat((kept, drawn))[-config.replay_size :]
            chosen = torch.randperm(len(kept), generator=generator)[: config.replay_batch_size]
            final = outcomes[kept[chosen]]
            states = PROCESS.remask(torch.full_like(final, TOKENS), final, generator)
            targets = group_targets("posterior", states, final, torch.ones(final.shape[:2]), PROCESS)
        loss = estimator_loss(MaskedLM(network), targets, PROCESS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()


def _at_every_state(law: Tensor) -> MatchingTargets:
    """All re-masked outcomes of a law, as often as `MaskedCTMC.remask` draws them."""
    outcomes = enumeration.states(TOKENS, POSITIONS)
    masked = enumeration.states(2, POSITIONS)[1:].bool()  # every set of positions but none
    count = masked.sum(dim=1)
    share = torch.tensor([1 / math.comb(POSITIONS, m) / POSITIONS for m in count.tolist()], dtype=torch.float64)
    states = torch.where(masked, TOKENS, outcomes[:, None]).flatten(0, 1)
    weight = (law[:, None] * share / count * len(states)).flatten()
    row, position = PROCESS.masked(states).nonzero(as_tuple=True)
    target = outcomes.repeat_interleave(len(masked), dim=0)[row, position]
    return MatchingTargets(
        states, torch.zeros_like(states[:, 0]), row, position, target[:, None], weight[row, None].float()
    )
