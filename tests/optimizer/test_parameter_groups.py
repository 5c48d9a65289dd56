"""Which parameter gets which learning rate and weight decay."""

import math

import pytest
import torch

from llmtrain.optimizer.groups import Rule


def settings(optimizer):
    """(lr_multiplier, weight_decay) by parameter name, and the groups checked against themselves on the way."""
    found = {}
    for group in optimizer.param_groups:
        assert len(group["names"]) == len(group["params"])
        assert group["lr"] == pytest.approx(0.01 * group["lr_multiplier"])
        for name in group["names"]:
            assert name not in found
            found[name] = (group["lr_multiplier"], group["weight_decay"])
    return found


def test_norms_and_biases_have_no_weight_decay(option, new_model):
    model = new_model()
    for name, (_, weight_decay) in settings(option().build(model)).items():
        assert weight_decay == (0.1 if model.get_parameter(name).dim() == 2 else 0.0), name


def test_every_trainable_parameter_is_in_one_group_and_tied_ones_count_once(option, new_model):
    model = new_model(tie=True)
    model.norm.requires_grad_(False)
    names = settings(option().build(model)).keys()
    assert names == {name for name, _ in model.named_parameters()} - {"norm.weight", "norm.bias"}
    assert "head.weight" not in names  # it is embedding.weight


def test_groups_name_the_parameters_in_their_order(option, new_model):
    model = new_model()
    for group in option().build(model).param_groups:
        assert all(model.get_parameter(n) is p for n, p in zip(group["names"], group["params"], strict=True))


def test_the_order_of_groups_is_deterministic(option, new_model):
    rules = [Rule("mlp", lr_multiplier=0.5)]
    orders = [[g["names"] for g in option(rules=rules).build(new_model()).param_groups] for _ in range(2)]
    assert orders[0] == orders[1]


def test_rules_change_what_they_name_and_the_last_wins(options, new_model):
    rules = [
        Rule(r"^blocks\.", lr_multiplier=0.5),
        Rule(r"blocks\.1\..*bias", weight_decay=0.3),
        Rule("mlp", lr_multiplier=0.1, weight_decay=0.0),
    ]
    found = settings(options["adamw"](rules=rules).build(new_model()))
    assert found["embedding.weight"] == (1.0, 0.1)
    assert found["blocks.0.attention.weight"] == (0.5, 0.1)
    assert found["blocks.0.attention.bias"] == (0.5, 0.0)
    assert found["blocks.1.attention.bias"] == (0.5, 0.3)
    assert found["blocks.1.mlp.weight"] == (0.1, 0.0)
    assert found["blocks.1.mlp.bias"] == (0.1, 0.0)


def test_layer_decay_slows_the_lower_layers(options, new_model):
    rules = [Rule(r"blocks\.0\.mlp", lr_multiplier=0.5)]
    found = settings(options["adamw"](layer_decay=0.5, rules=rules).build(new_model(tie=False)))
    assert {name: lr_multiplier for name, (lr_multiplier, _) in found.items() if name.endswith("weight")} == {
        "embedding.weight": 0.125,
        "blocks.0.norm.weight": 0.25,
        "blocks.0.attention.weight": 0.25,
        "blocks.0.mlp.weight": 0.125,
        "blocks.0.unused.weight": 0.25,
        "blocks.1.norm.weight": 0.5,
        "blocks.1.attention.weight": 0.5,
        "blocks.1.mlp.weight": 0.5,
        "blocks.1.unused.weight": 0.5,
        "norm.weight": 1.0,
        "head.weight": 1.0,
    }


def test_muon_takes_the_matrices_of_the_blocks_and_no_others(options, new_model):
    optimizer = options["muon"]().build(new_model(tie=False))
    muon, adamw = optimizer.parts
    matrices = [name for group in muon.param_groups for name in group["names"]]
    assert matrices == [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attention", "mlp", "unused")]
    assert all(group["lr_multiplier"] == 1 for group in muon.param_groups)
    assert all(group["lr_multiplier"] == pytest.approx(0.2) for group in adamw.param_groups)  # adamw_lr / lr


def test_a_rule_that_matches_nothing_is_an_error(option, new_model):
    rules = [Rule("mlp", lr_multiplier=0.5), Rule("atention", lr_multiplier=0.5)]
    with pytest.raises(ValueError, match=r"^rules\[1\]\.pattern='atention': .* the nearest are blocks.0.attention"):
        option(rules=rules).build(new_model())


def test_nothing_trainable_is_an_error(option, new_model):
    model = new_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^nothing to train: every parameter of the model is frozen"):
        option().build(model)


def test_muon_without_matrices_is_an_error(options, new_model):
    model = new_model()
    model.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^optimizer=muon: no matrix of a block is trainable"):
        options["muon"]().build(model)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("adamw", {"lr": 0.0}, "lr=0.0: must be positive"),
        ("adamw", {"lr": math.nan}, "lr=nan: must be positive"),
        ("adamw", {"weight_decay": -0.1}, "weight_decay=-0.1: must not be negative"),
        ("adamw", {"layer_decay": 1.5}, "layer_decay=1.5: must lie between 0 and 1"),
        ("adamw", {"layer_decay": 0.0}, "layer_decay=0.0: must be positive"),
        ("adamw", {"betas": [0.9]}, r"betas=\[0.9\]: must be two numbers"),
        ("adam", {"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]: must be two numbers"),
        ("lion", {"betas": [-0.1, 0.9]}, r"betas=\[-0.1, 0.9\]: must be two numbers"),
        ("adam", {"eps": -1.0}, "eps=-1.0: must not be negative"),
        ("sgd", {"momentum": 1.0}, "momentum=1.0: must be at least 0 and below 1"),
        ("sgd without momentum", {"nesterov": True}, "nesterov=True: needs a momentum above 0"),
        ("muon", {"momentum": -0.5}, "momentum=-0.5: must be at least 0"),
        ("muon", {"ns_steps": 0}, "ns_steps=0: must be at least 1"),
        ("muon", {"adamw_lr": 0.0}, "adamw_lr=0.0: must be positive"),
        ("adafactor", {"beta2_decay": 0.8}, "beta2_decay=0.8: must not be positive"),
        ("adafactor", {"clipping_threshold": 0.5}, "clipping_threshold=0.5: must be at least 1"),
        ("adafactor", {"eps1": 0.0}, "eps1=0.0: must be positive"),
        ("sgd", {"rules": [Rule("(", lr_multiplier=1.0)]}, r"rules\[0\].pattern='\(': not a regular expression"),
        ("sgd", {"rules": [Rule("a")]}, r"rules\[0\].pattern='a': give an lr_multiplier or a weight_decay"),
        ("sgd", {"rules": [Rule("a", lr_multiplier=-1.0)]}, r"rules\[0\].lr_multiplier=-1.0: must not be negative"),
    ],
)
def test_impossible_values_are_refused(options, name, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        options[name](**keys)


def test_every_optimizer_builds_on_the_meta_device(option, new_model):
    with torch.device("meta"):
        optimizer = option().build(new_model())
    assert {p.device.type for group in optimizer.param_groups for p in group["params"]} == {"meta"}
