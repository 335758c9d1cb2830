"""A rollout block by block with and without a cache of what is around the block.

    python -m benchmarks.block_rollout                                   exact, of block-causal attention
    python -m benchmarks.block_rollout --approximate --train 400 ...     of full attention
    ... --json FILE                                                      its figures, and the sizes that they are of

A Qwen3 told to have blocks, random; or one told to have full attention, trained for some steps on sequences of a random
Markov chain whose tokens have four successors each, of which the approximate cache's law is compared with the model's:
KL of paths, E_approximate[log p_approximate(path) - log p(path)], and of the likeliest tokens those that are equal.
Time is of this process' CPU, so that other work on the machine does not show.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dam.adjoint import estimator_loss, group_targets
from dam.backends import cpu
from dam.benchmarks import records, report
from dam.ctmc import MaskedCTMC
from dam.models import Denoiser, as_denoiser
from dam.rollout import Trajectories, rollout


class _Whole:
    """A denoiser without its passes over blocks."""

    def __init__(self, denoiser: Any):
        self._denoiser, self.blocks = denoiser, denoiser.blocks

    def hidden_states(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self._denoiser.hidden_states(tokens, attention_mask)

    def head(self) -> Any:
        return self._denoiser.head()


def chain(vocabulary: int, sequences: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences of a Markov chain over tokens below vocabulary - 1, each of which has four successors."""
    successors = torch.randint(vocabulary - 1, (vocabulary - 1, 4), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(vocabulary - 1, (sequences, length), generator=generator)
    which = torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0]), sequences * length, True, generator=generator)
    for i in range(1, length):
        tokens[:, i] = successors[tokens[:, i - 1], which.view(sequences, length)[:, i]]
    return tokens


def trained(denoiser: Any, process: MaskedCTMC, steps: int, vocabulary: int, length: int) -> None:
    """By the loss of masked diffusion, which is that of `posterior` with weights of 1."""
    model, generator = denoiser.model.train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        final = chain(vocabulary, 32, length, generator)[None]
        states = process.remask(torch.full_like(final, process.mask_token), final, generator)
        loss = estimator_loss(
            denoiser, group_targets("posterior", states, final, torch.ones(final.shape[:2]), process), process
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
    model.eval()
    if steps:
        print(f"trained: {float(loss.detach()):.3f} nats a token, of the last step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "layers": 4,
        "hidden": 256,
        "vocabulary": 32_768,
        "prompt": 128,
        "completion": 128,
        "block": 32,
        "steps": 128,
        "sequences": 1,
        "repeats": 5,
        "train": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--approximate", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
    )
    model = Qwen3ForCausalLM(config).eval()
    process = MaskedCTMC(mask_token=args.vocabulary - 1)
    length = args.prompt + args.completion
    whole: Denoiser
    if args.approximate:
        whole = as_denoiser(model, attention="full")
        trained(whole, process, args.train, args.vocabulary, length)
        denoiser: Any = as_denoiser(model, attention="full", approximate_cache=args.block)
    else:
        denoiser = as_denoiser(model, block_length=args.block)
        whole = _Whole(denoiser)
    tokens = chain(args.vocabulary, args.sequences, length, torch.Generator().manual_seed(2))
    tokens[:, args.prompt :] = process.mask_token
    denoiser.prefix_cache(tokens)  # the trial

    def filled_in(model: Denoiser, **options: Any) -> Trajectories:
        return rollout(model, tokens, process, steps=args.steps, block_length=args.block, seed=0, **options)

    times: dict[str, list[float]] = {"block by block": [], "whole sequences": []}
    for _ in range(args.repeats):
        finals = []
        for name, one in (("block by block", denoiser), ("whole sequences", whole)):
            start = time.process_time()
            finals.append(filled_in(one).final)
            times[name].append(time.process_time() - start)
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    figures = {**{f"seconds, {name}": statistics.median(each) for name, each in times.items()}, "ratio": ratio}
    figures["tokens equal"] = _equal(*finals, args.prompt)
    if args.approximate:
        kl = -filled_in(denoiser, base=whole).log_ratio.sum(dim=1)
        greedy = [filled_in(one, temperature=0.0).final for one in (denoiser, whole)]
        figures["KL of paths in nats"], figures["its standard error"] = (
            float(kl.mean()),
            float(kl.std()) / len(kl) ** 0.5,
        )
        figures["likeliest tokens equal"] = _equal(*greedy, args.prompt)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if args.json:
        sizes = {name: value for name, value in vars(args).items() if name != "json"}
        machine = {**records.versions(), "cpu": report.cpu_model(), "instruction_set": cpu.isa()}
        report.write_json(args.json, {**machine, **sizes, "figures": figures})


def _equal(a: torch.Tensor, b: torch.Tensor, start: int) -> float:
    return float((a[:, start:] == b[:, start:]).float().mean())


if __name__ == "__main__":
    main()
