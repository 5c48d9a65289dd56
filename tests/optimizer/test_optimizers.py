"""Every optimizer against plain torch, or against its formula in float64."""

import pytest
import torch

from llmtrain.optimizer import muon, update
from llmtrain.optimizer.adafactor import DeviceAdafactor, initial_state

STEPS = 5


def set_lr(optimizer, lr):
    """What the loop does before each step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def train(model, optimizer, rates):
    for step, lr in enumerate(rates):
        model.set_gradients(step)
        set_lr(optimizer, lr)
        optimizer.step()


def split(model):
    """Parameters with weight decay and without, as one would write it down by hand."""
    parameters = [p for name, p in model.named_parameters() if "unused" not in name]
    return [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]


def loop_reference(kind, **keys):
    def build(model):
        matrices, vectors = split(model)
        return kind([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, **keys)

    return build


REFERENCES = {
    "adamw": loop_reference(
        torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False
    ),
    "adam": loop_reference(torch.optim.Adam, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False),
    "sgd": loop_reference(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False, fused=False),
    "sgd without momentum": loop_reference(torch.optim.SGD, weight_decay=0.1, foreach=False, fused=False),
    "adafactor": loop_reference(torch.optim.Adafactor, weight_decay=0.1, foreach=True),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_optimizers_equal_torch_in_float64(options, new_model, name):
    rates = [0.01, 0.02, 0.005, 0.01, 0.001]
    ours, theirs = new_model(dtype=torch.float64), new_model(dtype=torch.float64)
    train(ours, options[name]().build(ours), rates)
    reference = REFERENCES[name](theirs)
    for step, lr in enumerate(rates):
        theirs.set_gradients(step)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12, msg=key)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_adafactor_on_a_device_equals_torchs(new_model, dtype, tolerance):
    """The form without copies to the host, on a CPU; the second step is skipped."""
    ours, theirs = new_model(dtype=dtype), new_model(dtype=dtype)
    keys = {"lr": 0.02, "weight_decay": 0.1, "d": 1.5}
    optimizer = DeviceAdafactor(list(ours.parameters()), **keys)
    for p in ours.parameters():
        optimizer.state[p] = initial_state(p)
    reference = torch.optim.Adafactor(theirs.parameters(), **keys)
    for step in range(4):
        ours.set_gradients(step)
        update(optimizer, torch.tensor(float(step == 1)))
        if step != 1:
            theirs.set_gradients(step)
            reference.step()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance / 10, msg=key)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in reference.state[other].items():
            torch.testing.assert_close(optimizer.state[mine][key], value, rtol=tolerance, atol=1e-12, msg=key)


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_muon_equals_torch_muon_beside_adamw(options, new_model, monkeypatch, adjust_lr_fn):
    """In bf16, as torch always multiplies."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: True)
    ours, theirs = new_model(), new_model()
    train(ours, options["muon"](adjust_lr_fn=muon.AdjustLR(adjust_lr_fn)).build(ours), [0.01] * STEPS)
    named = [(name, p) for name, p in theirs.named_parameters() if "unused" not in name]
    matrices = [p for name, p in named if name.startswith("blocks") and p.dim() == 2]
    vectors = [p for _, p in named if p.dim() < 2]
    matrix_optimizer = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust_lr_fn)
    groups = [{"params": [theirs.embedding.weight]}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.002, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(STEPS):
        theirs.set_gradients(step)
        matrix_optimizer.step()
        adamw.step()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if key.startswith("blocks") and mine.dim() == 2:
            assert torch.equal(mine, other), key
        else:  # the rate lr * (adamw_lr / lr) is adamw_lr up to rounding
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalisation_equals_its_formula_in_float64(monkeypatch, shape):
    """Of singular values s the iteration makes p(p(…p(s / norm))), p(s) = a s + b s^3 + c s^5; in fp32."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: False)
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b, c = 3.4445, -4.7750, 2.0315
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    sizes = sizes / sizes.norm()
    for _ in range(5):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    ours = muon.orthogonalise(matrix.float(), (a, b, c), 5, 1e-7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), left @ sizes.diag() @ right, rtol=0, atol=2e-5)


def test_an_update_of_muon_is_nearly_orthogonal(options, new_model, weights_of):
    model = new_model()
    before = weights_of(model)
    train(model, options["muon"](weight_decay=0.0).build(model), [0.01])
    update = before["blocks.0.mlp.weight"] - model.blocks[0].mlp.weight.detach()
    sizes = torch.linalg.svdvals(update) / (0.01 * 0.2 * 12**0.5)  # match_rms_adamw, 12 × 8
    assert 0.5 < sizes.min() < sizes.max() < 1.5


def test_lion_equals_its_formula_in_float64(options, new_model):
    """Algorithm 2 of Chen et al. 2023, element by element."""
    model, by_hand = new_model(dtype=torch.float64), new_model(dtype=torch.float64)
    rates = [0.01, 0.02, 0.005]
    train(model, options["lion"]().build(model), rates)
    momentum = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for step, lr in enumerate(rates):
        by_hand.set_gradients(step)
        for name, p in by_hand.named_parameters():
            if p.grad is None:
                continue
            update = torch.sign(0.9 * momentum[name] + (1 - 0.9) * p.grad)
            p.data = p.data - lr * (update + (0.1 if p.dim() == 2 else 0.0) * p.data)
            momentum[name] = 0.99 * momentum[name] + (1 - 0.99) * p.grad
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=name)


def test_optimizers_are_fused_where_torch_has_a_kernel(options, new_model):
    for name in ("adamw", "adam", "sgd"):
        assert all(group["fused"] for group in options[name]().build(new_model()).param_groups)


def test_learning_rate_multipliers_reach_the_update(option, new_model, weights_of):
    """A group whose rate is set to 0 stays; through the composite too."""
    model = new_model()
    before = weights_of(model)
    optimizer = option().build(model)
    model.set_gradients(0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if "embedding.weight" in group["names"] else 0.01
    optimizer.step()
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(model.blocks[0].norm.bias, before["blocks.0.norm.bias"])
