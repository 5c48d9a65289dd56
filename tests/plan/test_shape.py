"""Sizes read off the config of a model, against the modules themselves."""

import pytest
import torch

from llmtrain import Run
from llmtrain.plan.shape import shape_of

# Published numbers of parameters: Grattafiori et al. 2024 name the models; the counts are those of their weights.
LLAMA = {"llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800}


@pytest.mark.parametrize(("model", "parameters"), LLAMA.items())
def test_llama_3_has_its_published_number_of_parameters(model: str, parameters: int) -> None:
    config = Run.compose(f"model={model}").model
    assert config.vocab_size is not None
    assert shape_of(config, config.vocab_size).num_parameters == parameters
    with torch.device("meta"):
        assert config.build(config.vocab_size).num_parameters() == parameters


@pytest.mark.parametrize("model", [
    "gpt124m", "gpt355m", "llama2_7b", "llama3_2_1b", "qwen2_5_0_5b", "qwen3_0_6b", "mistral_7b", "baichuan2_7b",
    "smollm2_135m",
])  # fmt: skip
def test_parameters_and_flops_are_those_of_the_module(model: str) -> None:
    config = Run.compose(f"model={model}").model
    vocabulary = config.vocab_size or 50257
    shape = shape_of(config, vocabulary)
    with torch.device("meta"):
        module = config.build(vocabulary)
    assert shape.num_parameters == module.num_parameters()
    # the module counts norms and biases too
    assert shape.flops_per_token(1024) == pytest.approx(module.flops_per_token(1024), rel=0.002)


def test_the_parts_of_a_matrix_are_those_of_tensor_parallelism() -> None:
    config = Run.compose("model=llama3_8b").model
    query, key, _, output, gate, up, down = shape_of(config, 128256).matrices
    assert query.on_rank(4) == (4096, 1024)
    assert key.on_rank(4) == (4096, 256)
    assert output.on_rank(4) == (1024, 4096)
    assert gate.on_rank(4) == up.on_rank(4) == (4096, 3584)
    assert down.on_rank(4) == (3584, 4096)
