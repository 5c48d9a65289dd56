"""One optimizer composed of several."""

import copy

import pytest
import torch

from llmtrain.optimizer.composite import CompositeOptimizer


def make():
    one, two = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    parts = [torch.optim.SGD([one], lr=0.1, momentum=0.9), torch.optim.AdamW([two], lr=0.1)]
    return one, two, CompositeOptimizer(parts)


def fill(*parameters):
    for parameter in parameters:
        parameter.grad = torch.arange(1.0, len(parameter) + 1)


def test_groups_and_state_are_those_of_the_parts():
    one, two, optimizer = make()
    assert optimizer.param_groups[0] is optimizer.parts[0].param_groups[0]
    assert optimizer.param_groups[1] is optimizer.parts[1].param_groups[0]
    fill(one, two)
    optimizer.step()
    assert set(optimizer.state) == {one, two}
    assert optimizer.parts[1].state[two] is optimizer.state[two]
    optimizer.zero_grad()
    assert one.grad is two.grad is None


def test_a_parameter_belongs_to_one_part():
    shared = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        CompositeOptimizer([torch.optim.SGD([shared], lr=0.1), torch.optim.SGD([shared], lr=0.1)])


def test_a_composite_has_torchs_state_dict():
    one, two, optimizer = make()
    for _ in range(2):
        fill(one, two)
        optimizer.step()
    one_later, two_later, later = make()
    one_later.data, two_later.data = one.data.clone(), two.data.clone()
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, parameters in ((optimizer, (one, two)), (later, (one_later, two_later))):
        o.param_groups[0]["lr"] = 0.01  # reaches the part: the groups are still shared
        fill(*parameters)
        o.step()
    assert torch.equal(one, one_later)
    assert torch.equal(two, two_later)
