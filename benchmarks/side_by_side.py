"""A rollout and a training step of ours beside the published loops of LLaDA, d1 and c-DTM, restated in torch.

    python -m benchmarks.side_by_side [--calls 2] [--json FILE]

One random model of LLaDA's kind: Llama's layers under full attention, and a head of LLaDA's vocabulary. The head is
frozen, as an adapter on the layers leaves it. Each loop runs in a process of its own, one after another, round after
round: the time is of that process' CPU, so that other work on the machine does not show, the memory what its resident
set grows by. Published rollouts do the same work in each network call, so `--calls` of them are run and multiplied;
ours always runs whole.

Sources of the loops: Nie et al., arXiv 2502.09992 (generate: float64 Gumbel race and float64 softmax of all positions,
low-confidence remasking in blocks of 32); Zhao et al., d1, arXiv 2504.12216 (the same rollout; log-probabilities of all
completion tokens from one forward pass with the completion masked and 15% of the prompt, clipped ratio and KL);
c-DTM: `benchmarks.peers.cdtm_loss`, the base at the same re-masked states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.benchmarks import memory, peers, records, report

OURS = "dam"
LOOPS = {"rollout": (OURS, "LLaDA, d1"), "training step": (OURS, "d1", "c-DTM")}
BLOCK, TEMPERATURE, CLIP, BETA = 32, 1.0, 0.2, 0.04


class Setting:
    """The model, prompts with masked completions [B, L], and completions to train on."""

    def __init__(self, sizes: dict[str, int]):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.vocabulary, self.steps, self.completion = sizes["vocabulary"], sizes["steps"], sizes["completion"]
        self.mask_token = self.vocabulary - 1
        width = sizes["hidden"]
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model: Any = LlamaForCausalLM(config).eval()
        self.model.get_input_embeddings().requires_grad_(False)
        self.model.get_output_embeddings().requires_grad_(False)
        shape = (sizes["sequences"], sizes["prompt"] + self.completion)
        self.filled = torch.randint(self.mask_token, shape)
        self.tokens = self.filled.clone()
        self.tokens[:, sizes["prompt"] :] = self.mask_token
        self.weight = torch.rand(sizes["sequences"])

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, L, V], every position seeing every other."""
        seen = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1])
        return self.model(input_ids=tokens, attention_mask=seen.expand(len(tokens), -1, -1, -1), use_cache=False).logits

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.model.zero_grad(set_to_none=True)


def dam_rollout(setting: Setting, calls: int) -> float:
    from dam.ctmc import MaskedCTMC
    from dam.models import as_denoiser
    from dam.rollout import rollout

    denoiser = as_denoiser(setting.model, attention="full")
    drawn = rollout(denoiser, setting.tokens, MaskedCTMC(setting.mask_token), steps=setting.steps, seed=0)
    assert drawn.network_calls == setting.steps and not (drawn.final == setting.mask_token).any()
    return 1.0


@torch.no_grad()
def llada_rollout(setting: Setting, calls: int) -> float:
    """LLaDA's generate; what the calls that were made are to be multiplied by."""
    tokens = setting.tokens.clone()
    made, of_block = 0, setting.steps * BLOCK // setting.completion
    begin = tokens.shape[1] - setting.completion
    for block in range(begin, tokens.shape[1], BLOCK):
        left = BLOCK
        for n in range(of_block):
            logits = setting.logits(tokens)
            token, probability = llada_draw(logits)
            confidence = torch.where(tokens == setting.mask_token, probability, -torch.inf)
            confidence[:, block + BLOCK :] = -torch.inf
            fill = BLOCK // of_block + (n < BLOCK % of_block)
            at = confidence.topk(fill, dim=1).indices
            tokens.scatter_(1, at, token.gather(1, at))
            left -= fill
            made += 1
            if made == calls:
                return setting.steps / calls
        assert left == 0
    return 1.0


def llada_draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities, [B, L] each, of logits [B, L, V]."""
    double = logits.to(torch.float64)
    noise = (-torch.log(torch.rand_like(double))) ** TEMPERATURE
    token = (double.exp() / noise).argmax(dim=-1)
    p = F.softmax(logits.to(torch.float64), dim=-1)
    return token, p.gather(-1, token[..., None]).squeeze(-1)


def dam_step(setting: Setting, calls: int) -> float:
    from dam.adjoint import estimator_loss, group_targets
    from dam.ctmc import MaskedCTMC
    from dam.models import as_denoiser

    process = MaskedCTMC(setting.mask_token)
    final = setting.filled[None]
    states = process.remask(setting.tokens[None], final, seed=0, row_ids=torch.arange(final.shape[1])[None])
    targets = group_targets("posterior", states, final, setting.weight[None], process)
    setting.step(estimator_loss(as_denoiser(setting.model, attention="full"), targets, process))
    return 1.0


def d1_step(setting: Setting, calls: int) -> float:
    """With the log-probabilities of the reference and of the model that drew given: those cost another pass each."""
    begin = setting.tokens.shape[1] - setting.completion
    tokens = setting.tokens.clone()
    hidden = torch.rand(len(tokens), begin) < 0.15
    tokens[:, :begin] = torch.where(hidden, setting.mask_token, tokens[:, :begin])
    logits = setting.logits(tokens)[:, begin:]
    target = setting.filled[:, begin:]
    log_prob = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    old, reference = log_prob.detach(), log_prob.detach() + 0.01
    ratio = (log_prob - old).exp()
    gain = torch.minimum(ratio * setting.weight[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * setting.weight[:, None])
    kl = (reference - log_prob).exp() - (reference - log_prob) - 1
    setting.step(-(gain - BETA * kl).mean())
    return 1.0


def cdtm_step(setting: Setting, calls: int) -> float:
    from dam.ctmc import MaskedCTMC

    process = MaskedCTMC(setting.mask_token)
    ids = torch.arange(len(setting.tokens))
    states = process.remask(setting.tokens, setting.filled, seed=0, row_ids=ids)  # the states that ours trains at
    row, at = process.masked(states).nonzero(as_tuple=True)
    with torch.no_grad():
        base = setting.logits(states)[row, at]
    logits = setting.logits(states)[row, at]
    weight = setting.weight[row]
    setting.step(peers.cdtm_loss(logits, setting.filled[row, at][:, None], weight[:, None], base, 1 - weight))
    return 1.0


RUN: dict[tuple[str, str], Callable[[Setting, int], float]] = {
    ("rollout", OURS): dam_rollout,
    ("rollout", "LLaDA, d1"): llada_rollout,
    ("training step", OURS): dam_step,
    ("training step", "d1"): d1_step,
    ("training step", "c-DTM"): cdtm_step,
}
SIZES = {
    "sequences": 16,
    "prompt": 64,
    "completion": 128,
    "steps": 64,
    "vocabulary": 126_464,
    "hidden": 512,
    "layers": 4,
}


def measured(part: str, loop: str, calls: int, sizes: dict[str, int]) -> tuple[float, int]:
    """Seconds of CPU and bytes by which the resident set grew, in this process, which has done nothing else."""
    torch.set_num_threads(1)
    function = RUN[part, loop]
    # Libraries are loaded, and a model compared with its own logits, by the first call of anything.
    function(Setting({**sizes, "vocabulary": 64, "sequences": 2, "hidden": 64}), 1)
    setting = Setting(sizes)
    with memory.Peak() as peak:
        start = time.process_time()
        factor = function(setting, calls)
        seconds = time.process_time() - start
    return factor * seconds, peak.grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calls", type=int, default=2, help="network calls of published rollouts (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of all loops (default: 3)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in SIZES}
    if args.one:
        print(json.dumps(measured(*args.one, args.calls, sizes)))
        return
    found: dict[tuple[str, str], list[tuple[float, int]]] = {key: [] for key in RUN}
    for _ in range(args.rounds):
        for key, results in found.items():
            command = [sys.executable, "-m", "benchmarks.side_by_side", "--one", *key, "--calls", str(args.calls)]
            command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=memory.environment())
            results.append(tuple(json.loads(done.stdout)))
    rows = []
    for part, loops in LOOPS.items():
        ours = found[part, OURS]
        for loop in loops:
            results = found[part, loop]
            ratio = statistics.median(a[0] / b[0] for a, b in zip(results, ours, strict=True))
            row = {
                "part": part,
                "loop": loop,
                "seconds": statistics.median(seconds for seconds, _ in results),
                "of_ours": ratio,
                "bytes": statistics.median(grown for _, grown in results),
            }
            times = f"{row['seconds']:.2f} s, {ratio:.2f} of ours"
            print(f"{part}, {loop}: {times}, {row['bytes'] / 2**20:.0f} MiB", flush=True)
            rows.append(row)
    if args.json:
        machine = {**records.versions(), "cpu": report.cpu_model()}
        report.write_json(args.json, {**machine, **sizes, "calls": args.calls, "rows": rows})


if __name__ == "__main__":
    main()
