"""A flow, its base law and a configuration so small that a run takes a fraction of a second."""

import torch
from torch import nn

from dam import flows
from dam.train import FlowConfig

FLOAT64 = torch.float64
PROCESS = flows.FlowProcess()


class Law(nn.Module):
    """The velocity of a Gaussian whose mean and log variance are trained: it can be the tilt by a quadratic exactly."""

    def __init__(self, mean=(0.5, -0.3), variance=(0.8, 0.5)):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=FLOAT64))
        self.log_variance = nn.Parameter(torch.tensor(variance, dtype=FLOAT64).log())

    def law(self):
        weight = torch.zeros(1, dtype=FLOAT64)
        return flows.GaussianMixture(weight, self.mean[None], self.log_variance.exp()[None])

    def forward(self, state, time):
        return self.law().model(PROCESS.schedule)(state, time)


class Network(nn.Module):
    """A velocity of three coordinates with a condition, and dropout."""

    def __init__(self, seed=0, dropout=0.0, width=16):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))

    def forward(self, state, time, goal):
        return self.layers(torch.cat((state, time[:, None], goal[:, None]), dim=1))


ROWS = [{"goal": n / 8, "name": f"goal {n}"} for n in range(8)]


def near_goal(state, goal, name):
    """Differentiable, with a condition of its own, and a text."""
    assert all(text.startswith("goal") for text in name)
    return -(state - goal[:, None]).square().sum(dim=1)


def tiny_config(output, **changes):
    values = {
        "generation_batch_size": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        "diffusion_steps": 6,
        "max_steps": 6,
        "beta": 0.5,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return FlowConfig(output_dir=str(output), **values | changes)


def direct(learner, **changes):
    """The changes that make a configuration that of a direct learner."""
    of_others = {"generation_batch_size": None, "num_iterations": None, "beta": 1.0}
    return {"learner": learner, "per_device_train_batch_size": 4, **changes} | of_others
