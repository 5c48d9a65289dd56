"""The embedding's gradient beside torch's own."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model.embedding import Embedding


def gradients(rows, ids, dtype):
    torch.manual_seed(0)
    embedding = Embedding(rows, 24).to(dtype)
    upstream = torch.randn(*ids.shape, 24, dtype=dtype)
    (embedding(ids) * upstream).sum().backward()
    ours = embedding.weight.grad
    reference = embedding.weight.detach().clone().requires_grad_()
    (F.embedding(ids, reference) * upstream).sum().backward()
    return ours, reference.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_torchs_to_the_bit(dtype):
    ids = torch.randint(0, 50, (7, 33), generator=torch.Generator().manual_seed(1))  # each id several times
    ours, theirs = gradients(64, ids, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert not ours[50:].any()  # rows of no token


def test_positions_are_looked_up_without_a_batch():
    ours, theirs = gradients(16, torch.arange(9), torch.float32)
    assert torch.equal(ours, theirs)


def test_a_tied_weight_adds_up_both_gradients():
    embedding = Embedding(11, 4).double()
    ids = torch.tensor([[1, 2, 1], [10, 0, 2]])

    def loss(weight):
        return F.linear(F.embedding(ids, weight).tanh(), weight).square().sum()

    F.linear(embedding(ids).tanh(), embedding.weight).square().sum().backward()
    reference = embedding.weight.detach().clone().requires_grad_()
    loss(reference).backward()
    torch.testing.assert_close(embedding.weight.grad, reference.grad, rtol=1e-13, atol=1e-13)


def test_frozen_rows_have_no_gradient():
    embedding = Embedding(11, 4).requires_grad_(False)
    assert not embedding(torch.tensor([[1, 2]])).requires_grad
