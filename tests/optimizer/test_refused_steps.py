"""A refused step changes nothing, bit for bit; an allowed one is a plain step."""

import math

import pytest
import torch

from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.optimizer import update
from llmtrain.optimizer.adafactor import DeviceAdafactor, initial_state

REFUSE, ALLOW = torch.tensor(1.0), torch.tensor(0.0)


def snapshot(model, optimizer):
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights | {key: value.clone() for key, value in state_tensors(optimizer).items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key in one:
        left, right = (tensor[key].reshape(-1).view(torch.uint8) for tensor in (one, other))  # numpy has no bf16
        assert torch.equal(left, right), key


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_skipped_step_changes_no_bit(option, new_model, bad, steps_before):
    model = new_model()
    optimizer = option().build(model)
    for i in range(steps_before):
        model.set_gradients(i)
        update(optimizer, ALLOW)
    before = snapshot(model, optimizer)
    model.set_gradients(steps_before, fill=bad)
    update(optimizer, REFUSE)
    assert_same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("refused", [0, 2])
def test_training_after_a_skipped_step_is_as_without_it(option, new_model, refused):
    disturbed, plain = new_model(), new_model()
    optimizer, reference = option().build(disturbed), option().build(plain)
    for i in range(5):
        if i == refused:
            disturbed.set_gradients(99, fill=math.nan)
            update(optimizer, REFUSE)
        disturbed.set_gradients(i)
        update(optimizer, ALLOW)
        plain.set_gradients(i)
        reference.step()
    assert_same_bits(snapshot(disturbed, optimizer), snapshot(plain, reference))


def test_lion_is_exact_in_lower_and_higher_precision(options, new_model):
    for dtype in (torch.bfloat16, torch.float64):
        allowed, plain = new_model(dtype=dtype), new_model(dtype=dtype)
        optimizer, reference = options["lion"]().build(allowed), options["lion"]().build(plain)
        for i in range(3):
            allowed.set_gradients(i)
            update(optimizer, ALLOW)
            plain.set_gradients(i)
            reference.step()
        for ours, theirs in zip(allowed.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_update_divides_gradients(option, new_model):
    divided, plain = new_model(dtype=torch.float64), new_model(dtype=torch.float64)
    optimizer, reference = option().build(divided), option().build(plain)
    for i in range(3):
        divided.set_gradients(i)
        update(optimizer, ALLOW, torch.tensor(4.0))
        plain.set_gradients(i)
        for p in plain.parameters():
            p.grad = None if p.grad is None else p.grad / 4
        update(reference, ALLOW)
    for ours, theirs in zip(divided.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, 1.0])
def test_a_divisor_changes_no_bit_of_a_skipped_step(option, new_model, bad):
    model = new_model()
    optimizer = option().build(model)
    model.set_gradients(0)
    update(optimizer, ALLOW)
    before = snapshot(model, optimizer)
    model.set_gradients(1, fill=bad)
    update(optimizer, REFUSE, torch.tensor(bad))
    assert_same_bits(snapshot(model, optimizer), before)


def test_adafactor_on_a_device_skips_without_a_trace(new_model):
    model = new_model()
    optimizer = DeviceAdafactor(
        [{"params": list(model.parameters()), "names": [n for n, _ in model.named_parameters()]}]
    )
    for p in model.parameters():
        optimizer.state[p] = initial_state(p)
    for i, fill in enumerate([math.nan, None, math.inf]):
        before = snapshot(model, optimizer)
        model.set_gradients(i, fill=fill)
        update(optimizer, ALLOW if fill is None else REFUSE)
        if fill is not None:
            assert_same_bits(snapshot(model, optimizer), before)
    assert not torch.equal(model.norm.weight, new_model().norm.weight)


def test_an_optimizer_without_found_inf_skips_the_step_too(new_model):
    model = new_model()
    optimizer = torch.optim.RMSprop(model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_gradients(0, fill=math.nan)
    update(optimizer, REFUSE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.set_gradients(0)
    update(optimizer, ALLOW)
    assert not torch.equal(model.norm.weight, before["norm.weight"])


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(options, new_model):
    for option in options:
        model = new_model().cuda()
        optimizer = options[option]().build(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found_inf = REFUSE.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(optimizer, found_inf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
