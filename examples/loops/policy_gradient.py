"""Policy gradient on `dam.linear_log_prob`: REINFORCE for the same objective, E[-reward / beta] + KL(model || base).

    python examples/loops/policy_gradient.py

Its gradient is that of exact log-probabilities of the paths, so its optimum is p* too. What a trajectory costs,
log p_model - log p_base - reward / beta, is constant at p*: less the others' mean it leaves no noise there.
"""

from collections.abc import Sequence

import problem
import torch
from problem import BETA, LENGTH, MASK

import dam


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    given = problem.options(__doc__, steps=200).parse_args(arguments)
    model, base = problem.model_and_base(given.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=given.steps)
    report, rows = problem.Report(base, given.steps), torch.arange(given.batch)
    for n in range(given.steps):
        drawn = problem.rollout(model, base, given.batch, seed=given.seed + n)
        report.step(n, drawn)

        cost = -drawn.reward / BETA - drawn.log_ratio.sum(dim=1)
        others = (cost.sum() - cost) / (given.batch - 1)

        # All states that the trajectories went through, in one pass; the log-probabilities are differentiable.
        states = torch.cat([drawn.states(call) for call in range(LENGTH)])
        position, row = drawn.order.t().flatten(), rows.repeat(LENGTH)
        head_weight, bias = model.head
        log_prob = dam.linear_log_prob(
            model(states)[torch.arange(len(states)), position],
            head_weight,
            drawn.final[row, position],
            bias,
            exclude=MASK,
        )
        loss = ((cost - others)[row] * log_prob).sum() / given.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return report.end(model, seed=given.seed + given.steps)


if __name__ == "__main__":
    main()
