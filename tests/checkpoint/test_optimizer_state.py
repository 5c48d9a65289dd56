"""Optimizer state through a file and back."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.optimizer_state import load_state_tensors, state_tensors
from llmtrain.optimizer.groups import Rule
from llmtrain.optimizer.muon import MuonOptimizer


def train(model, optimizer, steps):
    for step in steps:
        model.set_gradients(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1) * group["lr_multiplier"]
        optimizer.step()


def resumed(model, optimizer, config, new_model, path):
    """A fresh model and optimizer with what went through a file."""
    save_file({key: tensor.contiguous() for key, tensor in state_tensors(optimizer).items()}, path)
    fresh = new_model()
    fresh.load_state_dict(model.state_dict())
    fresh_optimizer = config.build(fresh)
    load_state_tensors(fresh_optimizer, load_file(path))
    return fresh, fresh_optimizer


def assert_equal_to_the_bit(model, optimizer, other, other_optimizer):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ours, theirs = state_tensors(optimizer), state_tensors(other_optimizer)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("k", [0, 1, 4])
def test_resume_is_exact(option, new_model, tmp_path, k):
    config = option()
    whole, model = new_model(), new_model()
    whole_optimizer, optimizer = config.build(whole), config.build(model)
    train(whole, whole_optimizer, range(7))
    train(model, optimizer, range(k))
    model, optimizer = resumed(model, optimizer, config, new_model, tmp_path / "optimizer.safetensors")
    train(model, optimizer, range(k, 7))
    assert_equal_to_the_bit(model, optimizer, whole, whole_optimizer)


def test_state_is_matched_by_name_in_any_order_of_groups(option, new_model, tmp_path):
    """Another grouping of the same parameters takes the state all the same."""
    model = new_model()
    optimizer = option().build(model)
    train(model, optimizer, range(3))
    regrouped = replace(option(), rules=[Rule(r"blocks\.1|norm", lr_multiplier=1.0 + 1e-12)])
    fresh, fresh_optimizer = resumed(model, optimizer, regrouped, new_model, tmp_path / "optimizer.safetensors")
    orders = [[name for g in o.param_groups for name in g["names"]] for o in (optimizer, fresh_optimizer)]
    assert orders[0] != orders[1]
    assert_equal_to_the_bit(model, optimizer, fresh, fresh_optimizer)


def test_the_state_is_complete_before_the_first_step(option, new_model):
    model = new_model()
    optimizer = option().build(model)
    before = state_tensors(optimizer)
    assert all(not tensor.any() for tensor in before.values())
    shapes = {key: tensor.shape for key, tensor in before.items()}
    train(model, optimizer, range(2))
    assert {key: tensor.shape for key, tensor in state_tensors(optimizer).items()} == shapes


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "sgd without momentum", "muon", "adafactor"])
def test_state_made_early_equals_what_torch_makes_at_the_first_step(options, new_model, name):
    model = new_model()
    optimizer = options[name]().build(model)
    ours = {key: (t.dtype, t.shape, t.device) for key, t in state_tensors(optimizer).items() if "unused" not in key}
    optimizer.state.clear()
    for part in getattr(optimizer, "parts", ()):
        if isinstance(part, MuonOptimizer):  # which makes none itself
            part.__class__ = torch.optim.Muon
    train(model, optimizer, range(1))
    assert {key: (t.dtype, t.shape, t.device) for key, t in state_tensors(optimizer).items()} == ours


def test_keys_are_the_names_of_parameters(options, new_model):
    keys = state_tensors(options["adamw"]().build(new_model())).keys()
    assert {key for key in keys if key.startswith("norm.weight")} == {
        "norm.weight/step", "norm.weight/exp_avg", "norm.weight/exp_avg_sq",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "lion", "adafactor"])
def test_entries_that_do_not_fit_are_named(options, new_model, name):
    optimizer = options[name]().build(new_model())
    good = {key: tensor.clone() for key, tensor in state_tensors(optimizer).items()}
    key = next(key for key in good if key.startswith("embedding.weight/") and good[key].dim() == 2)

    with pytest.raises(ValueError, match=f"^optimizer state missing: {key}$"):
        load_state_tensors(optimizer, {k: tensor for k, tensor in good.items() if k != key})
    with pytest.raises(ValueError, match=r"^optimizer state not known: elsewhere\.weight/exp_avg$"):
        load_state_tensors(optimizer, good | {"elsewhere.weight/exp_avg": torch.zeros(2)})
    message = rf"^optimizer state of another shape or type: {key} \(float32 \[3\] instead of float32 \[\d+, \d+\]\)$"
    with pytest.raises(ValueError, match=message):
        load_state_tensors(optimizer, good | {key: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{key} \(float64 "):
        load_state_tensors(optimizer, good | {key: good[key].double()})


def test_a_state_of_another_optimizer_is_refused(options, new_model):
    momentum = state_tensors(options["sgd"]().build(new_model()))
    adamw = options["adamw"]().build(new_model())
    with pytest.raises(ValueError, match=r"^optimizer state missing: .* and \d+ more$"):
        load_state_tensors(adamw, momentum)


def test_an_optimizer_that_makes_its_state_later_can_be_saved_and_loaded(new_model, tmp_path):
    """Any optimizer of torch's, as a user's own option may build it."""

    def build(model):
        names, parameters = zip(*model.named_parameters(), strict=True)
        group = {"params": list(parameters), "names": list(names), "lr_multiplier": 1.0}
        return torch.optim.NAdam([group], lr=0.01)

    whole, model, fresh = new_model(), new_model(), new_model()
    whole_optimizer, optimizer, fresh_optimizer = build(whole), build(model), build(fresh)
    train(whole, whole_optimizer, range(5))
    train(model, optimizer, range(3))
    assert not any("unused" in key for key in state_tensors(optimizer))
    save_file(state_tensors(optimizer), tmp_path / "state.safetensors")
    fresh.load_state_dict(model.state_dict())
    load_state_tensors(fresh_optimizer, load_file(tmp_path / "state.safetensors"))
    train(fresh, fresh_optimizer, range(3, 5))
    assert_equal_to_the_bit(fresh, fresh_optimizer, whole, whole_optimizer)
    with pytest.raises(ValueError, match=r"^optimizer state not known: elsewhere/step$"):
        load_state_tensors(build(new_model()), {"elsewhere/step": torch.zeros(())})


class Counting(torch.optim.SGD):
    """Keeps Python numbers in its state."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["share"] = state.get("share", 1.0) / 3
                state["odd"] = state["count"] % 2 == 1


def test_python_numbers_in_the_state_survive_a_round_trip(tmp_path):
    def build():
        return Counting([{"params": [torch.nn.Parameter(torch.ones(2))], "names": ["w"], "lr_multiplier": 1.0}], lr=0.1)

    optimizer, fresh = build(), build()
    for _ in range(3):
        optimizer.step()
    save_file(state_tensors(optimizer), tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert set(loaded) == {"w/count:int", "w/share:float", "w/odd:bool"}
    for _ in range(2):  # into an empty state, then over one that is there
        load_state_tensors(fresh, loaded)
        (state,) = fresh.state.values()
        assert state == {"count": 3, "share": 1.0 / 3 / 3 / 3, "odd": True}
        assert {key: type(value) for key, value in state.items()} == {"count": int, "share": float, "odd": bool}
        fresh.step()
