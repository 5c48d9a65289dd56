"""The time of a step on a cluster: literal volumes, facts that must hold, published runs."""

import dataclasses

import pytest

from benchmarks.plan_cluster import compare
from benchmarks.published_runs import published_runs
from llmtrain.plan.links import Links
from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.rates import Rates
from llmtrain.plan.shape import Shape
from llmtrain.plan.step_time import (
    Engine,
    StepTime,
    block_seconds,
    bubble_share,
    context_seconds,
    elementwise_bytes,
    gather_seconds,
    product_seconds,
    step_time,
    tensor_bytes,
    tensor_seconds,
)  # fmt: skip

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, True, 128256, False, 8192, 4096)
LINKS = Links(gpus_per_host=8, host=450e9, network=50e9)
ENGINE = Engine(products=800e12, attention=350e12, bandwidth=3.35e12)
WORK = Work(sequence_length=8192, micro_batch=1, micro_batches=8)
EVEN = Rates(product_size=0, bandwidth_share=1, eager_traffic=3, power_exponent=1, contention=0, jitter=0)


def time(mesh: Mesh, work: Work = WORK, program: Program | None = None, links: Links = LINKS) -> StepTime:
    return step_time(LLAMA_8B, mesh, work, program or Program(), ENGINE, links)


def test_a_product_takes_two_operations_an_element() -> None:
    assert product_seconds(1000, 2000, 3000, 12e12, EVEN) == pytest.approx(1e-3)
    # dimensions of 100 reach half of the rate each
    assert product_seconds(100, 100, 100, 2e6, Rates(product_size=100)) == pytest.approx(8.0)


def test_the_computation_of_a_block_by_hand() -> None:
    seconds = block_seconds(LLAMA_8B, 1, WORK, Program(), ENGINE, EVEN)
    products = 2 * 8192 * 218_103_808 / 800e12
    attention = 2 * 8192 * 8192 * 4096 / 350e12  # half of the keys: 4 · s² · hidden / 2
    between = 8192 * 2 * (8 * 4096 + 2 * (4096 + 1024) + 3 * 14336) / 3.35e12
    assert elementwise_bytes(LLAMA_8B, 2) == 2 * (32768 + 10240 + 43008)
    assert elementwise_bytes(LLAMA_8B, 4) == 2 * (32768 + 10240 + 43008) + 2 * 5 * 4096
    assert seconds.forward == pytest.approx(products + attention + between)
    assert seconds.backward == pytest.approx(2 * products + 2.5 * attention + 2 * between)
    assert seconds.again == 0
    full = block_seconds(LLAMA_8B, 1, WORK, Program(recomputation=Recomputation.full), ENGINE, EVEN)
    assert full.again == full.forward
    half = Program(recomputation=Recomputation.full, recomputed_share=0.5)
    assert block_seconds(LLAMA_8B, 1, WORK, half, ENGINE, EVEN).again == pytest.approx(full.forward / 2)


def test_a_block_is_gathered_in_the_type_of_its_products() -> None:
    # 218,112,000 parameters of 2 bytes, of which 7/8 arrive at 360 GB/s
    seconds = gather_seconds(LLAMA_8B.block_parameters, Mesh(shard=8), Program(), LINKS)
    assert seconds == pytest.approx(218_112_000 * 2 * 7 / 8 / 360e9 + 7 * 3.4e-6)


def test_tensor_parallelism_moves_the_hidden_states_four_times_a_pass() -> None:
    assert tensor_bytes(LLAMA_8B, WORK) == 8192 * 4096 * 2 == 67_108_864
    passes = tensor_seconds(LLAMA_8B, Mesh(tensor=8), WORK, Program(), LINKS)
    once = 67_108_864 * 7 / 8 / 360e9 + 7 * 3.4e-6
    assert passes.forward == passes.backward == pytest.approx(4 * once)
    assert passes.again == 0
    assert time(Mesh()).parts["tensor"] == 0


@pytest.mark.parametrize(
    ("stages", "micro_batches", "each", "share"),
    [(1, 8, 1, 0), (4, 8, 1, 3 / 11), (8, 8, 1, 7 / 15), (4, 8, 3, 1 / 9), (4, 64, 1, 3 / 67)],
)
def test_the_bubble_of_a_pipeline(stages: int, micro_batches: int, each: int, share: float) -> None:
    assert bubble_share(stages, micro_batches, each) == pytest.approx(share)


def test_zero_bubble_leaves_a_third_of_the_gaps() -> None:
    idle = 3 / 2 / 3
    assert bubble_share(4, 8, 2, "zero_bubble") == pytest.approx(idle / (8 + idle))


def test_shared_positions_move_keys_and_values_of_whole_sequences() -> None:
    mesh, work = Mesh(context=8), dataclasses.replace(WORK, context=8)
    moved = 2 * 8192 * 1024 * 2  # keys and values of 8 heads of 128, in bf16
    once = LINKS.scatter_seconds(moved, mesh.context_group)
    assert once == pytest.approx(moved * 7 / 8 / (450e9 * 0.8) + 7 * 3.4e-6)
    seconds = context_seconds(LLAMA_8B, mesh, work, Program(), LINKS)
    assert (seconds.forward, seconds.again, seconds.backward) == (once, 0, once)
    full = Program(recomputation=Recomputation.full)
    assert context_seconds(LLAMA_8B, mesh, work, full, LINKS).again == once
    # of a block each rank computes an eighth, attention to all positions included
    alone = block_seconds(LLAMA_8B, 1, WORK, Program(), ENGINE, EVEN)
    assert block_seconds(LLAMA_8B, 1, work, Program(), ENGINE, EVEN).total == pytest.approx(alone.total / 8)
    assert time(mesh, work).parts["context"] == pytest.approx(8 * 32 * 2 * once)
    assert "context" not in {name for name, seconds in time(Mesh(), WORK).parts.items() if seconds}


def test_the_bubble_is_its_share_of_the_passes() -> None:
    result = time(Mesh(pipeline=4))
    passes = sum(result.parts[name] for name in ("forward", "recomputation", "backward", "tensor"))
    assert result.parts["bubble"] / (result.parts["bubble"] + passes) == pytest.approx(3 / 11)


def test_one_device_communicates_nothing() -> None:
    parts = time(Mesh()).parts
    silent = ("shards", "replicas", "tensor", "pipeline", "bubble", "contention", "waiting")
    assert [parts[name] for name in silent] == [0] * len(silent)
    assert min(parts[name] for name in ("forward", "backward", "optimizer")) > 0


def test_slower_links_and_less_power_take_longer() -> None:
    mesh = Mesh(shard=64)
    assert time(mesh, links=dataclasses.replace(LINKS, network=2e9)).seconds > 2 * time(mesh).seconds
    slow = step_time(LLAMA_8B, mesh, WORK, Program(), dataclasses.replace(ENGINE, power=0.5), LINKS)
    assert time(mesh).seconds < slow.seconds < 2 * time(mesh).seconds


def test_gradients_that_are_reduced_once_a_step_take_less_of_a_slow_network() -> None:
    slow = dataclasses.replace(LINKS, network=5e9)
    often, once = (
        time(Mesh(shard=64), links=slow, program=Program(reduces_every_micro_batch=every)).seconds
        for every in (True, False)
    )
    assert once < often


def test_blocks_that_stay_gathered_are_gathered_once_a_micro_batch() -> None:
    moved = [
        result.hidden + result.parts["shards"]
        for result in (time(Mesh(shard=8), program=Program(reshards=reshards)) for reshards in (True, False))
    ]
    block = gather_seconds(LLAMA_8B.block_parameters, Mesh(shard=8), Program(), LINKS)
    assert moved[0] - moved[1] == pytest.approx(8 * 32 * block)


def test_published_runs_are_predicted() -> None:
    """The rows that the rates are fitted to, and others that they have not seen."""
    rows = [compare(run) for run in published_runs()]
    fitted = [abs(row["error"]) for row in rows if row["is_fitted"]]
    others = [abs(row["error"]) for row in rows if not row["is_fitted"]]
    assert len(fitted) == 16
    assert max(fitted) < 0.15
    assert len(others) == 100
    assert max(others) < 0.30
    assert sum(error < 0.15 for error in others) >= 90
    memory = [abs(row["memory_error"]) for row in rows if row["is_fitted"] and row["memory_error"] is not None]
    assert len(memory) == 7
    assert max(memory) < 0.10


def test_replicas_exchange_their_weights_now_and_then() -> None:
    mesh, parameters = Mesh(replicate=64), LLAMA_8B.num_layers * LLAMA_8B.block_parameters + LLAMA_8B.outer_parameters
    found = time(mesh, program=Program(exchange_every=50, reduce_bytes=1))
    once = LINKS.reduce_seconds(parameters, mesh.replicate_group)
    assert found.parts["replicas"] == pytest.approx(once / 50)
    often = time(mesh, program=Program(exchange_every=1, reduce_bytes=4))
    assert often.parts["replicas"] == pytest.approx(LINKS.reduce_seconds(4 * parameters, mesh.replicate_group))
