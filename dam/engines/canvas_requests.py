"""How a canvas is to be drawn, as a request's parameters say it: knows no server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dam.engines.rows import CONTRACT, KEY, check_contract


@dataclasses.dataclass(frozen=True)
class CanvasRequest:
    """Of one trajectory of `dam.canvas.rollout`."""

    seed: int
    row_id: int
    steps: int
    temperature: float
    size: int  # of the process, and so of the model's head

    @property
    def law(self) -> tuple[int, int, float]:
        """What canvases with the same are drawn by together: seed, steps and temperature."""
        return self.seed, self.steps, self.temperature

    def as_parameters(self) -> dict[str, Any]:
        fields = {f"{KEY}_{name}": value for name, value in dataclasses.asdict(self).items()}
        return {KEY: CONTRACT, **fields, f"{KEY}_seed": str(self.seed), f"{KEY}_row_id": str(self.row_id)}

    @classmethod
    def of_parameters(cls, given: Mapping[str, Any]) -> CanvasRequest | None:
        """None of a request that is none of ours.

        Raises:
            ValueError: it is of another contract.
        """
        if KEY not in given:
            return None
        check_contract(given)
        return cls(
            int(given[f"{KEY}_seed"]),
            int(given[f"{KEY}_row_id"]),
            int(given[f"{KEY}_steps"]),
            float(given[f"{KEY}_temperature"]),
            int(given[f"{KEY}_size"]),
        )
