"""Small networks for samplers of densities: functions of states [B, D] and times [B] that give numbers [B, D]."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from dam.flows.adjoint import Cost, cost_gradient
from dam.flows.annealed import clipped

_TIME_FREQUENCIES = 4


def _time_features(time: Tensor) -> Tensor:
    """[B, 2 F + 1]."""
    angle = math.pi * time[:, None] * torch.arange(1, _TIME_FREQUENCIES + 1, device=time.device, dtype=time.dtype)
    return torch.cat((time[:, None], angle.sin(), angle.cos()), dim=1)


class Perceptron(nn.Module):
    """SiLU layers on a state, sines of it and of the time. It begins as 0, the reference without a control.

    Args:
        dim: D.
        scale: of states, by which they are divided.
        output: of what is predicted, by which the last layer is multiplied.
        hidden, layers: width and number of hidden layers.
        octaves: sines and cosines of pi x / scale times 1, 2, 4, ...: for targets that are much finer than `scale`.
    """

    def __init__(self, dim: int, *, scale: float, output: float, hidden: int = 128, layers: int = 3, octaves: int = 0):
        super().__init__()
        self.scale, self.output, self.octaves = scale, output, octaves
        sizes = [dim * (1 + 2 * octaves) + 2 * _TIME_FREQUENCIES + 1, *[hidden] * layers]
        parts: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            parts += [nn.Linear(n, m), nn.SiLU()]
        last = nn.Linear(sizes[-1], dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*parts, last)

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        scaled = state / self.scale
        angle = [math.pi * 2**n * scaled for n in range(self.octaves)]
        waves = [f(a) for a in angle for f in (torch.sin, torch.cos)]
        return self.output * self.net(torch.cat((scaled, *waves, _time_features(time)), dim=1))


class ParticleNetwork(nn.Module):
    """Displacements of N particles that turn, shift and swap with them: messages of pairs by distance and time.

        prediction_i = sum_j (x_i - x_j) phi(m_ij, h_i + h_j, d_ij, t),      d_ij = |x_i - x_j|,      h_i = sum_j m_ij

        m_ij = psi_1(d_ij, t), to which each later layer adds psi_l(m_ij, h_i + h_j, d_ij, t)

    So it moves no centre of mass. It begins as 0. All functions are of pairs without an order, so each is evaluated
    once for a pair. From two layers on a pair knows of distances that neither of its particles is in.

    Args:
        particles, dimensions: N and their space's; states are [B, N * dimensions].
        scale, output: as for `Perceptron`.
        hidden, layers: width and number of messages.

    Source: Satorras et al., E(n) Equivariant Graph Neural Networks, arXiv 2102.09844, of which it is a small one.
    """

    def __init__(
        self, particles: int, dimensions: int, *, scale: float, output: float, hidden: int = 64, layers: int = 1
    ):
        super().__init__()
        self.particles, self.dimensions, self.scale, self.output = particles, dimensions, scale, output
        self.centres: Tensor
        self.register_buffer("centres", torch.linspace(0, 4, 16), persistent=False)
        # [P, N]: of each pair 1 at its first particle and -1 at its second.
        first, second = torch.triu_indices(particles, particles, 1)
        ones = torch.eye(particles)
        self.pairs: Tensor
        self.register_buffer("pairs", ones[first] - ones[second], persistent=False)
        edge = len(self.centres) + 1 + 2 * _TIME_FREQUENCIES + 1
        self.message = nn.Sequential(nn.Linear(edge, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.later = nn.ModuleList(
            nn.Sequential(nn.Linear(edge + 2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
            for _ in range(layers - 1)
        )
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.pair = nn.Sequential(
            nn.Linear(edge + 2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        x = state.view(len(state), self.particles, self.dimensions) / self.scale
        gap = self.pairs @ x  # [B, P, dimensions]
        distance = (gap.square().sum(dim=2, keepdim=True) + 1e-8).sqrt()
        # Bumps of the distance, 4 scales wide together: a pair's force changes sign within a fraction of one.
        bumps = torch.exp(-((distance - self.centres) ** 2) * 8)
        times = _time_features(time)[:, None].expand(-1, len(self.pairs), -1)
        edge = torch.cat((distance, bumps, times), dim=2)
        message = self.message(edge)
        for later in self.later:
            message = message + later(self._around(edge, message))
        force = self.pair(self._around(edge, message)) * gap / (distance + 1)
        return self.output * (self.pairs.T @ force).view_as(state)

    def _around(self, edge: Tensor, message: Tensor) -> Tensor:
        """What there is to know of each pair: of itself, its message, and those of its particles together."""
        node = self.pairs.abs().T @ message / self.particles
        return torch.cat((edge, message, self.pairs.abs() @ node), dim=2)


class Preconditioned(nn.Module):
    """A network with the gradient of a cost beside it: Langevin preconditioning.

        prediction = network(x, t) - strength(t) grad g(x),      grad g cut in norm

    What is to be predicted at time t is the mean of -grad g(X_1) given X_t = x, which near time 1 is the gradient where
    the path is: a small network follows it badly. The strength, one number at each time, is learned and begins as 0. At
    time 0 the gradient is left out: paths from one point have the same there, and particles in one point have none.

    Args:
        network: of states [B, D] and times [B].
        cost: g of states [B, D], [B]. Each prediction evaluates it once at every state of a time above 0, with its
            gradient, of which autograd knows nothing.
        largest: norm that the gradient of a row is cut to. Targets are as they were: what is learned is not biased.

    Raises:
        ValueError: largest is not > 0.

    Source: Zhang and Chen, Path Integral Sampler, arXiv 2111.15141; Vargas et al., Denoising Diffusion Samplers, arXiv
    2302.13834, with the cut.
    """

    def __init__(self, network: nn.Module, cost: Cost, *, largest: float):
        super().__init__()
        if not largest > 0:
            raise ValueError(f"Preconditioned: largest must be > 0; got {largest}")
        self.network, self.cost, self.largest = network, cost, largest
        last = nn.Linear(_STRENGTH_WIDTH, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.strength = nn.Sequential(nn.Linear(2 * _TIME_FREQUENCIES + 1, _STRENGTH_WIDTH), nn.SiLU(), last)

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        slope = torch.zeros_like(state)
        moved = time > 0
        if bool(moved.any()):
            slope[moved] = clipped(cost_gradient(self.cost, state[moved]), self.largest)[0]
        return self.network(state, time) - self.strength(_time_features(time)) * slope


_STRENGTH_WIDTH = 32
