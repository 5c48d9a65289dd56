"""A small transformer-shaped model and every optimizer option."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from llmtrain.optimizer import OptimizerConfig
from llmtrain.optimizer.adafactor import Adafactor
from llmtrain.optimizer.adam import Adam
from llmtrain.optimizer.adamw import AdamW
from llmtrain.optimizer.adamw_8bit import AdamW8bit
from llmtrain.optimizer.adamw_bf16 import AdamWBF16
from llmtrain.optimizer.lion import Lion
from llmtrain.optimizer.muon import AdjustLR, Muon
from llmtrain.optimizer.sgd import SGD

COMMON = {"lr": 0.01, "weight_decay": 0.1, "layer_decay": 1.0, "rules": []}
ADAM = {"betas": [0.9, 0.95], "eps": 1e-8}
MUON = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": AdjustLR.match_rms_adamw, "adamw_lr": 0.002}
COMPACT = {"min_elements": 64}  # the matrices of the blocks; in 8 bits embeddings are excepted
ADAFACTOR = {"beta2_decay": -0.8, "clipping_threshold": 1.0, "eps1": None, "eps2": 1e-3}

OPTIONS: dict[str, Callable[..., OptimizerConfig]] = {
    "adamw": lambda **keys: AdamW(**COMMON | ADAM | keys),
    "adamw_8bit": lambda **keys: AdamW8bit(**COMMON | ADAM | COMPACT | {"fp32_embeddings": True} | keys),
    "adamw_bf16": lambda **keys: AdamWBF16(**COMMON | ADAM | COMPACT | keys),
    "adam": lambda **keys: Adam(**COMMON | ADAM | keys),
    "sgd": lambda **keys: SGD(**COMMON | {"momentum": 0.9, "nesterov": True} | keys),
    "sgd without momentum": lambda **keys: SGD(**COMMON | {"momentum": 0.0, "nesterov": False} | keys),
    "muon": lambda **keys: Muon(**COMMON | ADAM | MUON | keys),
    "lion": lambda **keys: Lion(**COMMON | {"betas": [0.9, 0.99]} | keys),
    "adafactor": lambda **keys: Adafactor(**COMMON | ADAFACTOR | keys),
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
