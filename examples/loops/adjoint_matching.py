"""Discrete Adjoint Matching in a loop of one's own: the operations, and nothing else of dam.

python examples/loops/adjoint_matching.py
"""

from collections.abc import Sequence

import problem
import torch
from problem import BETA, MASK

import dam


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = problem.options(__doc__, steps=150)
    parser.add_argument("--updates", type=int, default=4, help="gradient steps of a rollout (default: %(default)s)")
    given = parser.parse_args(arguments)
    model, base = problem.model_and_base(given.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=given.steps)
    generator = torch.Generator().manual_seed(given.seed)
    report = problem.Report(base, given.steps)
    for n in range(given.steps):
        drawn = problem.rollout(model, base, given.batch, seed=given.seed + n)
        report.step(n, drawn)

        # W exp(-g) of each trajectory over their mean: what turns the model's law of paths into that of p*.
        weights = dam.adjoint_weights(drawn.log_ratio[None], -drawn.reward[None] / BETA)

        # The terminal posterior: outcomes partly masked again, the model matched to what they were.
        for _ in range(given.updates):
            states, masked = problem.remasked(drawn.final, generator)
            row, position = masked.nonzero(as_tuple=True)
            head_weight, bias = model.head
            loss = dam.linear_matching_loss(
                model(states)[row, position],
                head_weight,
                drawn.final[row, position][:, None],
                weights.weight[0, row, None],
                bias,
                row_scale=1 / (given.batch * masked.sum(dim=1)[row]),
                exclude=MASK,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    return report.end(model, seed=given.seed + given.steps)


if __name__ == "__main__":
    main()
