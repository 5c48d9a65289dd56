"""Checkpoints of replicas that train on their own: read by as many, by more or fewer, and by runs without replicas."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrain.base.places import OUTER_MOMENTUM, OWN_WEIGHT
from llmtrain.base.world import World
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.model_state import saved_tensors, stored_places
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.restore import restore
from llmtrain.checkpoint.stored_tensors import read_group
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.replicas import Replicas
from llmtrain.objective import TrainingUnit
from tests.checkpoint.divisions import checkpoint_of, saver_of
from tests.distributed.sharing import make_unit
from tests.helpers.options import make_option
from tests.helpers.worlds import on_ranks

Tensors = dict[str, Tensor]


@dataclass
class Member:
    """A rank's parts of a run."""

    unit: TrainingUnit
    optimizer: torch.optim.Optimizer
    parallel: Parallel

    def tensors(self) -> tuple[Tensors, Tensors]:
        """Copies of the model of a checkpoint, and of the optimizer's state."""
        places = self.parallel.places()
        model = saved_tensors(self.unit, self.parallel.held(), places)
        groups = model, state_tensors(self.optimizer)
        model, state = ({name: tensor.detach().clone() for name, tensor in group.items()} for group in groups)
        return model, state

    def restore(self, checkpoint: Path, *, fresh_optimizer: bool = False) -> "Member":
        parallel = self.parallel
        restore(
            checkpoint, self.unit, self.optimizer, fresh_optimizer=fresh_optimizer, weights=parallel.held(),
            places=stored_places(self.unit, parallel.places()),
        )  # fmt: skip
        return self


def member(world: World | None, *, kind: str = "gpt", optimizer: str = "adamw") -> Member:
    """One of the replicas of ``world``; None: a process without replicas."""
    unit = make_unit(kind)
    options = make_option("distributed", "local_sgd", {})
    parallel = Parallel(unit) if world is None else Replicas(options, unit, world)
    built = make_option("optimizer", optimizer, {"lr": 0.01, "adamw_lr": 0.01, "min_elements": 64}).build(unit)
    parallel.adopt(built)
    return Member(unit, built, parallel)


def train(one: Member, seed: int) -> Member:
    """Give a rank weights and state of its own, and all the same common weights."""
    with torch.no_grad():
        for number, (entry, tensor) in enumerate(state_tensors(one.optimizer).items()):
            is_alike = entry.endswith(OUTER_MOMENTUM)
            generator = torch.Generator().manual_seed(1000 * number + (0 if is_alike else seed))
            values = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(values * 100 if tensor.dtype == torch.uint8 else values)
        for number, tensor in enumerate(one.parallel.held().values()):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        for name in one.unit.model.padded_weights:  # as in training: padding is 0
            if name in one.parallel.held():
                one.parallel.held()[name][one.unit.model.vocab_size :] = 0
    return one


def save(run_dir: Path, size: int, **what: str) -> list[tuple[Tensors, Tensors]]:
    """Write the checkpoint of so many replicas; the tensors of each."""

    def on_rank(world: World) -> tuple[Tensors, Tensors]:
        one = train(member(world, **what), 1 + world.rank)
        places = stored_places(one.unit, one.parallel.places())
        expected = one.tensors()
        with saver_of(run_dir, world, places) as saver:
            saver.begin(saved_tensors(one.unit, one.parallel.held(), one.parallel.places()),
                        state_tensors(one.optimizer), {"step": 1}, {})  # fmt: skip
            saver.before_update()
            train(one, 77)  # training goes on
            saved = saver.collect(wait=True)
        assert saved is not None
        assert saved.error is None
        return expected

    return on_ranks(size, on_rank)


def different(found: Tensors, expected: Tensors) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("what", [{}, {"optimizer": "muon"}, {"optimizer": "adamw_8bit"}, {"kind": "gpt lora"}])
@pytest.mark.parametrize("size", [1, 2])
def test_each_replica_continues_with_its_own_state(tmp_path: Path, size: int, what: dict[str, str]) -> None:
    expected = save(tmp_path, size, **what)
    checkpoint = checkpoint_of(tmp_path)
    verify_checkpoint(checkpoint)

    def on_rank(world: World) -> tuple[Tensors, Tensors]:
        return member(world, **what).restore(checkpoint).tensors()

    for (model, state), (expected_model, expected_state) in zip(on_ranks(size, on_rank), expected, strict=True):
        assert different(model, expected_model) == []
        assert different(state, expected_state) == []
    own = [state for _, state in expected]
    assert size == 1 or any(not torch.equal(own[0][entry], own[1][entry]) for entry in own[0])


def test_own_weights_are_trained_after_a_restore(tmp_path: Path) -> None:
    save(tmp_path, 2)

    def on_rank(world: World) -> bool:
        one = member(world).restore(checkpoint_of(tmp_path))
        return all(
            weight.data_ptr() == one.optimizer.state[weight][OWN_WEIGHT].data_ptr()
            and torch.equal(weight, one.optimizer.state[weight][OWN_WEIGHT])
            for _, weight in one.parallel.weights()
        )

    assert on_ranks(2, on_rank) == [True, True]


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_replicas_takes_the_states_in_turn(tmp_path: Path, size: int) -> None:
    expected = save(tmp_path, 2)
    found = on_ranks(size, lambda world: member(world).restore(checkpoint_of(tmp_path)).tensors())
    for rank, (model, state) in enumerate(found):
        assert different(model, expected[0][0]) == []
        assert different(state, expected[rank % 2][1]) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_without_replicas_takes_the_common_weights_and_the_first_state(tmp_path: Path, size: int) -> None:
    expected_model, expected_state = save(tmp_path, size)[0]
    one = member(None).restore(checkpoint_of(tmp_path))
    found_model, found_state = one.tensors()
    padded, rows = one.unit.model.padded_weights, one.unit.model.vocab_size
    cut = {name: tensor[:rows] if name in padded else tensor for name, tensor in expected_model.items()}
    assert different(found_model, cut) == []
    kept = {
        entry: tensor
        for entry, tensor in expected_state.items()
        if entry.partition("/")[2] not in (OWN_WEIGHT, OUTER_MOMENTUM)
    }
    assert different(found_state, kept) == []


def test_one_process_reads_the_common_weights(tmp_path: Path) -> None:
    """As ``generate``, ``export`` and ``weights=checkpoint`` do."""
    expected = save(tmp_path, 2)[0][0]
    found = read_group(checkpoint_of(tmp_path), "model")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name][: len(tensor)]), name


@pytest.mark.parametrize("size", [1, 2])
def test_replicas_start_from_a_checkpoint_without(tmp_path: Path, size: int) -> None:
    one = train(member(None), 5)
    with saver_of(tmp_path, on_ranks(1, lambda world: world)[0], {}) as saver:
        saver.begin(saved_tensors(one.unit), state_tensors(one.optimizer), {"step": 1}, {}, copied=False)
        assert (saved := saver.collect(wait=True)) is not None
        assert saved.error is None
    model, state = one.tensors()

    def on_rank(world: World) -> list[str]:
        other = member(world).restore(checkpoint_of(tmp_path))
        found_model, found_state = other.tensors()
        weights = dict(other.parallel.weights())
        wrong = [name for name, tensor in model.items() if not torch.equal(found_model[name][: len(tensor)], tensor)]
        wrong += [entry for entry, tensor in state.items() if not torch.equal(found_state[entry], tensor)]
        wrong += [name for name, held in other.parallel.held().items() if not torch.equal(weights[name], held)]
        return wrong + [entry for entry, tensor in found_state.items() if OUTER_MOMENTUM in entry and tensor.any()]

    assert on_ranks(size, on_rank) == [[]] * size


def test_another_kind_of_optimizer_keeps_own_weights_and_outer_momentum(tmp_path: Path) -> None:
    expected = save(tmp_path, 2)

    def on_rank(world: World) -> tuple[Tensors, Tensors]:
        return member(world, optimizer="lion").restore(checkpoint_of(tmp_path), fresh_optimizer=True).tensors()

    for (model, state), (expected_model, expected_state) in zip(on_ranks(2, on_rank), expected, strict=True):
        assert different(model, expected_model) == []
        for entry, tensor in state.items():
            if entry.partition("/")[2] in (OWN_WEIGHT, OUTER_MOMENTUM):
                assert torch.equal(tensor, expected_state[entry]), entry
            else:
                assert not tensor.any(), entry
