"""Plans for a mesh: this program's memory against a traced step, the meshes that fit, the largest model in time."""

import time

import pytest

from llmtrain import Run
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.cluster import Cluster, ClusterRun, divisible_batch, plan_mesh, program_of, rank_meshes, state_bytes
from llmtrain.plan.devices import arithmetic, find_device
from llmtrain.plan.links import Network, links_of
from llmtrain.plan.memory import Category, estimate
from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Recomputation
from llmtrain.plan.rank_memory import rank_memory
from llmtrain.plan.shape import shape_of

SPEC = find_device("h100-80gb")
LINKS = links_of(SPEC.name, 8, Network.infiniband, None, None)


def blueprint(*overrides: str, batch: int = 16) -> Blueprint:
    run = Run.compose("precision=bf16", *overrides)
    return Blueprint(run, run.model.vocab_size or 50257, arithmetic(run.precision, SPEC), batch)


def cluster_run(*overrides: str, batch: int = 16) -> tuple[ClusterRun, Blueprint]:
    made = blueprint(*overrides, batch=batch)
    shape = shape_of(made.settings.model, made.vocab_size)
    program = program_of(made, shape, reshards=True)
    return ClusterRun(shape, program, made.sequence_length, batch, made.micro_batch_size), made


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [
    ("model=gpt124m",), ("model=gpt124m", "activation_checkpointing=full"),
    ("model=gpt355m", "activation_checkpointing=selective"), ("model=llama3_2_1b", "data.sequence_length=2048"),
])  # fmt: skip
def test_one_device_needs_the_memory_of_a_traced_step(overrides: tuple[str, ...]) -> None:
    run, made = cluster_run(*overrides, "accumulation.batch_size=16", "accumulation.micro_batch_size=8")
    memory = rank_memory(run.shape, Mesh(), run.work(Mesh()), run.program)
    traced = estimate(made, gpu=True).parts
    assert memory.peak == pytest.approx(sum(traced[category.name] for category in Category), rel=0.08)
    assert memory.parts["optimizer"] == pytest.approx(traced["optimizer"], rel=0.01)
    assert memory.parts["weights"] == pytest.approx(traced["weights"], rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "in_blocks", "outside"),
    [("adamw", 8, 8), ("lion", 4, 4), ("muon", 4, 8), ("adamw_8bit", 2.03, 5.0), ("adafactor", 0, 0)],
)
def test_the_state_of_an_optimizer_is_read_off_small_models(
    optimizer: str, in_blocks: float, outside: float
) -> None:  # fmt: skip
    made = blueprint("model=llama3_8b", "tokenizer=byte", f"optimizer={optimizer}")
    found = state_bytes(made, shape_of(made.settings.model, made.vocab_size))
    assert found == (pytest.approx(in_blocks, abs=0.02), pytest.approx(outside, abs=0.05))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (Recomputation.none, 1.0)),
        (("activation_checkpointing=selective",), (Recomputation.selective, 1.0)),
        (
            ("activation_checkpointing=selective", "activation_checkpointing.by=block",
             "activation_checkpointing.every=4"),
            (Recomputation.full, 0.25),
        ),
    ],
)  # fmt: skip
def test_recomputation_is_that_of_the_run(overrides: tuple[str, ...], expected: tuple[Recomputation, float]) -> None:
    run, _ = cluster_run("model=gpt124m", *overrides)
    assert (run.program.recomputation, run.program.recomputed_share) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("lora=lora", "weights=checkpoint", "weights.path=run"),
            "lora=lora: a plan for several devices does not know adapters; take lora=none",
        ),
        (
            ("activation_checkpointing=full", "activation_checkpointing.offload=true"),
            "activation_checkpointing.offload=true: a plan for several devices does not know it",
        ),
    ],
)
def test_settings_that_the_model_does_not_know_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_run("model=gpt124m", *overrides)


def test_micro_batches_divide_the_batch_of_a_rank() -> None:
    run, _ = cluster_run("model=gpt124m", "accumulation.batch_size=48", "accumulation.micro_batch_size=8", batch=48)
    work = run.work(Mesh(shard=4))
    assert (work.micro_batch, work.micro_batches) == (6, 2)
    assert divisible_batch(48, 4) == 48
    assert divisible_batch(8, 64) == 64
    assert divisible_batch(100, 64) == 128


def test_meshes_that_fit_are_ranked_by_time() -> None:
    run, made = cluster_run("model=llama3_8b", "tokenizer=byte", "accumulation.micro_batch_size=1", batch=64)
    cluster = Cluster(SPEC, 64, LINKS)
    plans = rank_meshes(run, cluster, made.precision)
    seconds = [plan.time.seconds for plan in plans]
    assert seconds == sorted(seconds)
    assert all(plan.fits and plan.mesh.devices == 64 for plan in plans)
    assert Mesh(replicate=64) not in [plan.mesh for plan in plans]  # 128 GB of weights, gradients and state
    same = plan_mesh(run, cluster, made.precision, plans[0].mesh)
    assert same.time == plans[0].time
    flops = run.shape.flops_per_token(8192) * 64 * 8192
    assert plans[0].mfu == pytest.approx(flops / (seconds[0] * 64 * 989.4e12))


def test_what_does_not_fit_is_planned_with_less_memory_for_activations() -> None:
    run, made = cluster_run("model=llama3_8b", "tokenizer=byte", batch=256)
    plans = rank_meshes(run, Cluster(SPEC, 16, LINKS), made.precision, ("shard",))
    assert {plan.mesh for plan in plans} == {Mesh(shard=16)}
    assert ("activation_checkpointing=full",) in [plan.changes for plan in plans]
    assert all(plan.changes for plan in plans)
    assert rank_meshes(run, Cluster(SPEC, 1, LINKS), made.precision) == []


def test_pipelines_that_train_refuses_are_not_among_the_ranked_meshes() -> None:
    def ranked(schedule: str, micro_batch_size: int) -> list[Mesh]:
        words = ("data.sequence_length=2048", f"accumulation.micro_batch_size={micro_batch_size}")
        run, made = cluster_run("model=llama3_2_1b", *words, f"distributed.pipeline_schedule={schedule}", batch=16)
        plans = rank_meshes(run, Cluster(SPEC, 16, LINKS), made.precision)
        return [plan.mesh for plan in plans if plan.mesh.pipeline > 1]

    assert ranked("1f1b", 2) == []  # fewer micro-batches than stages
    assert ranked("gpipe", 2)
    meshes = ranked("1f1b", 1)
    assert any(mesh.shard > 1 for mesh in meshes)
    assert all(mesh.tensor == mesh.context == 1 for mesh in meshes)
    meshes = ranked("zero_bubble", 1)
    assert meshes
    assert all(mesh.shard == 1 for mesh in meshes)


def test_405b_on_512_devices_is_planned_within_three_seconds() -> None:
    start = time.process_time()
    overrides = ("model=llama3_405b", "tokenizer=byte", "data.sequence_length=8192", "activation_checkpointing=full")
    run, made = cluster_run(*overrides, "accumulation.micro_batch_size=1", batch=2048)
    plans = rank_meshes(run, Cluster(SPEC, 512, LINKS), made.precision)
    assert time.process_time() - start < 3
    assert plans
    assert plans[0].mesh.tensor > 1
    assert 0.2 < plans[0].mfu < 0.6
