"""Discrete Tilt Matching (c-DTM) on `dam.linear_matching_loss`: the tilt goes to 1 in stages, each with its teacher.

    python examples/loops/tilt_matching.py

(e^{h r} - c) CE(outcome) + c CE(teacher): outcomes of the teacher, drawn anew in each stage's steps, and the teacher's
whole distribution beside them, which is the operation's base. h is 1 / (beta stages), r the reward less its mean.

Source: Discrete Tilt Matching, arXiv 2604.18739.
"""

import copy
from collections.abc import Sequence

import problem
import torch
from problem import BETA, MASK

import dam

CONSTANT = 1.0  # c: at r = 0 a trajectory then asks for the teacher and nothing else


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = problem.options(__doc__, steps=400)
    parser.add_argument("--stages", type=int, default=8, help="default: %(default)s")
    given = parser.parse_args(arguments)
    model, base = problem.model_and_base(given.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=given.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=given.steps)
    generator = torch.Generator().manual_seed(given.seed)
    report, stage = problem.Report(base, given.steps), -1
    for n in range(given.steps):
        if (now := n * given.stages // given.steps) != stage:
            stage, teacher = now, copy.deepcopy(model).requires_grad_(False)
        drawn = problem.rollout(teacher, base, given.batch, seed=given.seed + n)
        report.step(n, drawn)

        gain = (drawn.reward - drawn.reward.mean()) / (BETA * given.stages)
        states, masked = problem.remasked(drawn.final, generator)
        row, position = masked.nonzero(as_tuple=True)
        (head_weight, bias), (teacher_weight, teacher_bias) = model.head, teacher.head
        loss = dam.linear_matching_loss(
            model(states)[row, position],
            head_weight,
            drawn.final[row, position][:, None],
            (gain.exp() - CONSTANT)[row, None],
            bias,
            base_hidden=teacher(states)[row, position],
            base_head_weight=teacher_weight,
            base_bias=teacher_bias,
            base_weight=torch.full((len(row),), CONSTANT),
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
