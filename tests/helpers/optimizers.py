"""A small transformer-shaped model, every optimizer option, and fixtures of both."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.optimizer import OptimizerConfig
from tests.helpers.options import make_option, option_names

# min_elements: so that the low-bit options store the blocks' matrices of this model in few bits
COMMON = {"lr": 0.01, "weight_decay": 0.1, "min_elements": 64, "adamw_lr": 0.002}
VARIANTS = {"sgd without momentum": ("sgd", {"momentum": 0.0, "nesterov": False})}


def make(name: str, **keys: Any) -> OptimizerConfig:
    """The option, or the variant of one, with the keys given."""
    option, changes = VARIANTS.get(name, (name, {}))
    return replace(make_option("optimizer", option, COMMON, **changes), **keys)


OPTIONS: dict[str, Callable[..., OptimizerConfig]] = {
    name: partial(make, name) for name in (*option_names("optimizer"), *VARIANTS)
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 12)
        self.unused = nn.Linear(8, 3)  # no gradient ever reaches it


class Transformer(nn.Module):
    num_layers = 2

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(self.num_layers))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    @property
    def trained_names(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.named_parameters()

    def layer_index(self, name: str) -> int:
        if name.startswith("embedding"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else self.num_layers + 1

    def set_gradients(self, step: int, fill: float | None = None) -> None:
        """Gradients that depend on the parameter's name and the step alone; ``unused`` gets none."""
        for name, parameter in self.named_parameters():
            if "unused" not in name:
                generator = torch.Generator().manual_seed(hash((len(name), sum(map(ord, name)), step)) % 2**31)
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = gradient.to(parameter.dtype)
                if fill is not None:
                    parameter.grad.view(-1)[::3] = fill


@pytest.fixture(params=list(OPTIONS))
def option(request: pytest.FixtureRequest) -> Callable[..., OptimizerConfig]:
    return OPTIONS[request.param]


@pytest.fixture
def options() -> dict[str, Callable[..., OptimizerConfig]]:
    return OPTIONS


@pytest.fixture
def new_model() -> Callable[..., Transformer]:
    def build(*, tie: bool = True, dtype: torch.dtype = torch.float32) -> Transformer:
        torch.manual_seed(0)
        return Transformer(tie).to(dtype)

    return build


@pytest.fixture
def weights_of() -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda model: {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
