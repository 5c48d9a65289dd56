"""Random numbers by name."""

import torch

from llmtrain import Run
from llmtrain.base.named_generators import NamedGenerators

CPU = torch.device("cpu")
SEED = 213252394453521586


def test_a_generator_follows_from_seed_and_name_alone() -> None:
    generators = NamedGenerators(1337)
    generators.of("head.weight", CPU)
    # int.from_bytes(hashlib.sha256(b"1337/blocks.0.mlp.up.weight").digest()[:8], "big") >> 1, in every process
    assert generators.of("blocks.0.mlp.up.weight", CPU).initial_seed() == SEED
    assert NamedGenerators(1338).of("blocks.0.mlp.up.weight", CPU).initial_seed() != SEED


def test_initial_values_do_not_depend_on_other_parameters() -> None:
    """A model with more blocks, and a head of its own, has the values of the smaller one in the rest."""
    small = Run.compose("model=tiny", "model.num_layers=2").model
    large = Run.compose("model=tiny", "model.num_layers=3", "model.tie_embeddings=false").model
    few, more = (config.create(100, CPU, NamedGenerators(7)).state_dict() for config in (small, large))
    scaled = ("attention.projection.weight", "mlp.down.weight")  # by the number of layers
    same = [name for name in few if not name.endswith(scaled)]
    assert len(same) > 10
    assert all(torch.equal(few[name], more[name]) for name in same)
    assert not torch.equal(few["blocks.0.mlp.up.weight"], few["blocks.1.mlp.up.weight"])
