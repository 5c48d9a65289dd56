"""Meshes of a cluster plan: what divides what, and the messages where it does not."""

import pytest

from llmtrain.plan.mesh import Mesh, mesh_of, possible_meshes
from llmtrain.plan.shape import Shape

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, True, 128256, False, 8192, 4096)


def test_a_degree_of_minus_one_is_what_is_left() -> None:
    assert mesh_of(64, {"replicate": 1, "shard": -1}) == Mesh(shard=64)
    assert mesh_of(64, {"replicate": -1, "shard": 8, "tensor": 2}) == Mesh(replicate=4, shard=8, tensor=2)
    assert mesh_of(1, {}) == Mesh()


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"shard": -1, "tensor": 3},
            "devices=64: not the product of the mesh's degrees, shard -1 × tensor 3; take a m",
        ),
        ({"replicate": 2, "shard": 8}, "devices=64: not the product of the mesh's degrees, .*; take devices=16"),
        ({"replicate": 1}, "devices=64: not the product of the mesh's degrees, all 1; take distributed=fsdp, or"),
        ({"replicate": -1, "shard": -1}, "distributed.replicate and distributed.shard=-1: only one degree"),
        ({"replicate": 0, "shard": -1}, "distributed.replicate=0: must be at least 1"),
    ],
)
def test_degrees_that_do_not_make_the_devices_are_refused(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_of(64, degrees)


@pytest.mark.parametrize(
    ("mesh", "sequences", "message"),
    [
        (Mesh(tensor=16), 64, "distributed.tensor=16: does not divide the 8 key and value heads of the model; take 8"),
        (Mesh(tensor=3), 64, "distributed.tensor=3: does not divide the 8 key and value heads of the model; take 2"),
        (Mesh(pipeline=33), 64, "distributed.pipeline=33: the model has 32 blocks; take at most 32 stages"),
        (Mesh(pipeline=2, context=4), 64, "distributed.context=4: does not go with distributed.pipeline=2"),
        (Mesh(shard=24), 64, "accumulation.batch_size=64: not divisible by the 24 ranks .* take 72, or another mesh"),
        (Mesh(shard=64), 8, "accumulation.batch_size=8: not divisible by the 64 ranks .* take 64, or another mesh"),
    ],
)
def test_a_mesh_that_a_model_or_a_batch_cannot_be_divided_over_is_refused(
    mesh: Mesh, sequences: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mesh.check(LLAMA_8B, sequences)


def test_possible_meshes_multiply_to_the_devices_and_keep_tensor_parallelism_on_a_host() -> None:
    meshes = list(possible_meshes(64, LLAMA_8B, 256, 4))
    assert Mesh(shard=64) in meshes
    assert Mesh(replicate=2, shard=8, tensor=4) in meshes
    assert {mesh.devices for mesh in meshes} == {64}
    assert max(mesh.tensor for mesh in meshes) == 4
    assert max(mesh.pipeline for mesh in meshes) == 32
    assert len(meshes) == len(set(meshes))
    few = list(possible_meshes(64, LLAMA_8B, 256, 8, ("replicate", "shard")))
    assert [(mesh.replicate, mesh.shard) for mesh in few] == [
        (64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (2, 32), (1, 64)
    ]  # fmt: skip


def test_a_mesh_is_written_as_overrides() -> None:
    assert Mesh(shard=64).overrides() == (
        "distributed=fsdp", "distributed.replicate=1", "distributed.shard=64", "distributed.context=1",
        "distributed.tensor=1", "distributed.pipeline=1",
    )  # fmt: skip
    assert Mesh(shard=64).overrides(("shard",)) == ("distributed=fsdp", "distributed.shard=64")
    assert [Mesh(**{name: 2}).option for name in ("replicate", "tensor", "pipeline", "context")] == [
        "ddp",
        "tensor",
        "pipeline",
        "context",
    ]
    assert Mesh(replicate=2, shard=2).option == "hsdp"


def test_weights_are_divided_over_shard_and_context() -> None:
    degrees = {"replicate": 1, "shard": -1, "context": 8}
    mesh = mesh_of(8, degrees)
    assert (mesh.shard, mesh.context, mesh.weight_parts, mesh.option) == (1, 8, 8, "fsdp")
    assert "distributed.shard=-1" in mesh.overrides()  # 1 would leave the weights whole
    both = mesh_of(64, degrees | {"tensor": 2})
    assert (both.shard, both.weight_parts, both.data) == (4, 32, 4)
    assert (both.context_group.stride, both.shard_group.stride) == (2, 2)
    whole = mesh_of(8, {"replicate": -1, "shard": 1, "context": 2})
    assert (whole.weight_parts, whole.replicate_group.size, whole.data) == (1, 8, 4)
