"""The counter of launches and bytes against operations whose work is known."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.gpu.counter import LaunchCounter, counting
from benchmarks.gpu.launches import ROOT, commit_of, count, record
from tests.helpers.gpu_without_data import skip_without_driver

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _tensors_of_a_gpu() -> None:
    skip_without_driver()


@pytest.fixture
def counter() -> LaunchCounter:
    with counting() as counter:
        yield counter


def on_gpu(*shape: int, **options: object) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", **options)


def test_matrix_product_reads_its_inputs_and_writes_its_result(counter: LaunchCounter) -> None:
    _ = on_gpu(512, 256) @ on_gpu(256, 1024)
    work = counter.take()
    assert work.launches == {"mm": 1}
    assert work.read["mm"] == 4 * (512 * 256 + 256 * 1024)
    assert work.written["mm"] == 4 * 512 * 1024


def test_views_are_free_and_an_overwritten_tensor_is_not_read(counter: LaunchCounter) -> None:
    x = on_gpu(1024, 1024)
    x.t()[:, 3:].unflatten(0, (2, 512)).detach().expand(2, 2, 512, 1021)
    assert counter.take().launches == {}
    x.zero_()
    x[0] = 1.0
    x.add_(x[:1])
    work = counter.take()
    assert (work.read["zero_"], work.written["zero_"]) == (0, 4 * MIB)
    assert (work.read["add_"], work.written["add_"]) == (4 * MIB + 4 * 1024, 4 * MIB)


def test_lookup_reads_the_rows_that_it_returns(counter: LaunchCounter) -> None:
    F.embedding(on_gpu(16, dtype=torch.long), on_gpu(50_000, 64))
    work = counter.take()
    assert work.read["embedding"] == 16 * 8 + 16 * 64 * 4


def test_autocast_casts_a_weight_once_within_its_context(counter: LaunchCounter) -> None:
    weight = torch.nn.Parameter(on_gpu(64, 64))
    x = on_gpu(8, 64)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            assert F.linear(x, weight).dtype == F.linear(x, weight).dtype == torch.bfloat16
        assert counter.take().launches == {"_to_copy": 3, "mm": 2}  # the input twice, the weight once
    assert F.linear(x, weight).dtype == torch.float32


def test_attention_is_one_launch_forward_and_one_backward(counter: LaunchCounter) -> None:
    query, key, value = (on_gpu(2, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert counter.take().launches == {"_scaled_dot_product_flash_attention": 1}
    y.sum().backward()
    assert counter.take().launches["_scaled_dot_product_flash_attention_backward"] == 1


def test_synchronisations_are_counted(counter: LaunchCounter) -> None:
    on_gpu(3).sum().item()
    on_gpu(3).cpu()
    assert counter.take().waits == {"item": 1, "_to_copy": 1}


def test_compiled_function_is_one_launch_besides_its_products(counter: LaunchCounter) -> None:
    @torch.compile
    def scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2.0).add_(1.0)
        return (x @ y).exp()

    scaled(on_gpu(256, 256), on_gpu(256, 256))
    work = counter.take()
    assert work.launches == {"mm": 1, "compiled scaled": 1}
    assert work.written["compiled scaled"] == 2 * 4 * 256 * 256  # x, and the result


def test_optimizer_that_waits_for_the_device_is_counted_too() -> None:
    muon = count(ROOT, ("model=tiny", "tokenizer=byte", "data.sequence_length=64", "precision=bf16", "optimizer=muon"))
    assert muon["update"]["launches"] > 100


def test_step_is_counted_by_phase_and_recorded(tmp_path) -> None:
    tiny = ("model=tiny", "tokenizer=byte", "data.sequence_length=64", "precision=bf16")
    one, two = count(ROOT, tiny), count(ROOT, (*tiny, "accumulation.micro_batch_size=4"))
    assert one["update"]["operations"]["_fused_adamw_"][0] == 2  # with weight decay, and without
    assert two["backward"]["launches"] > 2 * one["backward"]["launches"]  # gradients are added up
    assert two["update"] == one["update"]
    assert not one["forward"]["synchronisations"]
    for commit, figures in (("a", one), ("b", two), ("a", two)):
        record(tmp_path / "launches.json", {"case": "tiny", "commit": commit, "overrides": []} | figures)
    rows = [line for line in (tmp_path / "launches.md").read_text().splitlines() if line.startswith("| tiny")]
    assert [row.split(" | ")[1] for row in rows] == ["b", "a"]
    assert commit_of(tmp_path) == "unknown"
