"""A model and its optimizer restored from a checkpoint of any number of ranks, at any other number."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.places import Place
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.base.world import World
from llmtrain.checkpoint.format import write_checkpoint
from llmtrain.checkpoint.model_state import restore_model, saved_tensors, stored_places
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.restore import restore
from llmtrain.checkpoint.writer import Saver
from llmtrain.model.gpt import GPTConfig, Initialisation
from llmtrain.objective import TrainingUnit
from tests.checkpoint.test_policy import policy
from tests.helpers.sharding import rows_of
from tests.helpers.units import as_unit
from tests.helpers.worlds import ThreadWorld, on_ranks


def new_unit(seed: int, vocab_size: int = 70, hidden_size: int = 6) -> TrainingUnit:
    """A small GPT, whose vocabulary is padded from 70 to 128 rows."""
    config = GPTConfig(
        num_layers=2, hidden_size=hidden_size, num_heads=2, context_length=8, vocab_size=None, dropout=0.0,
        qkv_bias=True, tie_embeddings=True, logit_softcap=None, initialisation=Initialisation.torch,
    )  # fmt: skip
    return as_unit(config.create(vocab_size, torch.device("cpu"), NamedGenerators(seed)))


class Rank:
    """A rank's part of a unit by rows, as parameters of its own, and an optimizer over them."""

    def __init__(self, unit: TrainingUnit, world: World) -> None:
        self.unit = unit
        self.weights: dict[str, nn.Parameter] = {}
        places = {}
        for name, parameter in unit.named_weights():
            start, end = rows_of(len(parameter), world)
            self.weights[name] = nn.Parameter(parameter.detach()[start:end].clone())
            places[name] = Place((start, *(0 for _ in parameter.shape[1:])), tuple(parameter.shape), True)
        self.places = stored_places(unit, places)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.1)
        self.optimizer.param_groups[0]["names"] = list(self.weights)

    def train(self, steps: int, world: World) -> None:
        """Do steps with gradients that depend on the element alone; padding has none."""
        for step in range(steps):
            for number, (name, weight) in enumerate(self.weights.items()):
                whole = torch.Size(next(p.shape for n, p in self.unit.named_weights() if n == name))
                gradient = torch.randn(whole, generator=torch.Generator().manual_seed(100 * step + number))
                if name in self.unit.model.padded_weights:
                    gradient[self.unit.model.vocab_size :] = 0
                start, end = rows_of(len(gradient), world)
                weight.grad = gradient[start:end].clone()
            self.optimizer.step()

    def restore(self, path: Path) -> None:
        restore(path, self.unit, self.optimizer, weights=self.weights, places=self.places)

    def tensors(self) -> dict[str, Tensor]:
        """All weights and state, padding included."""
        state = state_tensors(self.optimizer)
        return {name: weight.detach() for name, weight in self.weights.items()} | state


def save(ranks: list[Rank], run_dir: Path, step: int) -> Path:
    """Write a checkpoint of all ranks."""

    def on_rank(world: World) -> None:
        rank, device = ranks[world.rank], torch.device("cpu")
        with Saver(policy(), run_dir, device, config_text="", world=world, places=rank.places) as saver:
            model = saved_tensors(rank.unit, rank.weights, rank.places)
            saver.begin(model, state_tensors(rank.optimizer), {"step": step}, {})
            saved = saver.collect(wait=True)
            assert saved is not None
            assert saved.error is None, saved.error

    on_ranks(len(ranks), on_rank)
    return run_dir / "checkpoints" / f"step-{step:08d}"


def assert_equal(ranks: list[Rank], whole: Rank) -> None:
    """The ranks hold the bits of the one that holds everything."""
    expected = whole.tensors()
    for rank, world in zip(ranks, ThreadWorld.of(len(ranks)), strict=True):
        found = rank.tensors()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            start, end = rows_of(len(tensor), world) if tensor.dim() else (0, None)
            assert torch.equal(found[name], tensor[start:end] if tensor.dim() else tensor), name


@pytest.mark.parametrize("has_state", [True, False])  # before an optimizer has made its state, too
def test_a_run_continues_at_4_3_1_2_ranks(tmp_path: Path, has_state: bool) -> None:
    straight = Rank(new_unit(1), ThreadWorld.of(1)[0])
    ranks = [Rank(new_unit(1), world) for world in ThreadWorld.of(4)]
    step = 0
    for size in (4, 3, 1, 2):
        if step:
            path = save(ranks, tmp_path, step)
            ranks = [Rank(new_unit(9), world) for world in ThreadWorld.of(size)]
            for rank, world in zip(ranks, ThreadWorld.of(size), strict=True):
                if has_state:
                    rank.train(1, world)
                rank.restore(path)
            assert_equal(ranks, straight)
        for rank, world in zip([straight, *ranks], [ThreadWorld.of(1)[0], *ThreadWorld.of(size)], strict=True):
            rank.train(2, world)
        step += 2
    assert_equal(ranks, straight)


def test_one_process_reads_what_ranks_have_written_and_ranks_read_what_it_has(tmp_path: Path) -> None:
    ranks = [Rank(new_unit(1), world) for world in ThreadWorld.of(3)]
    for rank, world in zip(ranks, ThreadWorld.of(3), strict=True):
        rank.train(1, world)
    path = save(ranks, tmp_path, 1)
    unit = new_unit(2)
    optimizer = torch.optim.AdamW([parameter for _, parameter in unit.named_weights()])
    optimizer.param_groups[0]["names"] = [name for name, _ in unit.named_weights()]
    assert restore(path, unit, optimizer) == {"step": 1}
    alone = tmp_path / "step-00000001"
    model, state = saved_tensors(unit), state_tensors(optimizer)
    write_checkpoint(alone, model=model, optimizer=state, state={"step": 1}, config="")
    again = [Rank(new_unit(3), world) for world in ThreadWorld.of(2)]
    for rank in again:
        rank.restore(alone)
    whole = Rank(new_unit(4), ThreadWorld.of(1)[0])
    whole.restore(path)
    assert_equal(again, whole)
    assert_equal(ranks, whole)
    assert model["token_embedding.weight"].shape == (70, 6)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    ranks = [Rank(new_unit(1), world) for world in ThreadWorld.of(2)]
    for rank, world in zip(ranks, ThreadWorld.of(2), strict=True):
        rank.train(1, world)
    path = save(ranks, tmp_path, 1)
    world = ThreadWorld.of(2)[1]
    other = Rank(new_unit(1, hidden_size=8), world)
    with pytest.raises(CheckpointError, match=r"index\.json: .*weight is \[70, 6\], this run's is \[70, 8\]"):
        other.restore(path)
    with pytest.raises(CheckpointError, match=r"index\.json: does not fit the model: .*weight is \(70, 6\)"):
        restore_model(new_unit(1, hidden_size=8), path)
    halved = Rank(new_unit(1), world)
    halved.weights = {name: nn.Parameter(weight.detach().half()) for name, weight in halved.weights.items()}
    with pytest.raises(CheckpointError, match=r"model-0000.-of-.*: .* is float32, this run's is float16"):
        halved.restore(path)
    fresh = Rank(new_unit(1), world)
    short = torch.optim.SGD(fresh.weights.values(), lr=0.1, momentum=0.9)
    short.param_groups[0]["names"] = list(fresh.weights)
    for weight in fresh.weights.values():
        weight.grad = torch.zeros_like(weight)
    short.step()
    with pytest.raises(CheckpointError, match=r"index\.json: optimizer state missing: .*/momentum_buffer"):
        restore(path, fresh.unit, short, weights=fresh.weights, places=fresh.places)


def test_frozen_weights_that_come_from_elsewhere_are_not_in_a_checkpoint() -> None:
    rank = Rank(new_unit(1), ThreadWorld.of(2)[1])
    rank.unit.has_base = True
    for name, parameter in rank.unit.named_weights():
        parameter.requires_grad_("norm" in name)
    trained = {name: weight for name, weight in rank.weights.items() if "norm" in name}
    found = saved_tensors(rank.unit, trained, rank.places)
    assert found.keys() == trained.keys()
    assert found["final_norm.weight"].shape == (3,)
