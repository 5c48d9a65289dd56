"""Random number generators of initial values: one for each name."""

import hashlib

import torch


class NamedGenerators:
    """The generators of a run's initial values: that of a parameter follows from ``seed`` and its name alone.

    So an initial value depends neither on the order in which modules are made, nor on the values drawn before it, nor
    on the number of ranks: each draws the whole of a parameter and keeps its part.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of(self, name: str, device: torch.device) -> torch.Generator:
        """The generator, on ``device``, of the parameter ``name``, as checkpoints name it."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
