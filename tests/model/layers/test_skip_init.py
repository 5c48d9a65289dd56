"""Construction of modules without random numbers."""

import torch
from torch import nn

from llmtrain import Run
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.model.layers.skip_init import SkipInitMode


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    with SkipInitMode():
        layer, embedding, norm = nn.Linear(3, 5), nn.Embedding(7, 2), nn.LayerNorm(4)
        torch.empty(3).normal_()
    assert torch.equal(torch.get_rng_state(), before)
    assert (layer.weight.shape, embedding.weight.shape) == ((5, 3), (7, 2))
    assert torch.equal(norm.weight, torch.ones(4))  # what is not random is filled


def test_a_model_depends_on_its_generators_alone() -> None:
    config = Run.compose("model=tiny").model
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(config.create(100, torch.device("cpu"), NamedGenerators(7)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
