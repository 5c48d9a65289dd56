"""The start of a unit that no rank ever holds as a whole: the same values, in the memory of the parts."""

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from llmtrain import Run
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.world import World
from llmtrain.checkpoint.format import write_checkpoint
from llmtrain.config.assemble import build_unit
from llmtrain.config.own_values import builds_parts, fill_own_parts, knows_values, own_parts
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.pipeline import Pipeline
from llmtrain.distributed.share import share_data
from llmtrain.distributed.tensor import TensorParallel
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.distributed.unit_cut import UnitCut
from llmtrain.hf.writing import config_json
from llmtrain.hf.writing import write_checkpoint as write_directory
from llmtrain.objective import TrainingUnit
from tests.distributed.sharing import make_batch
from tests.helpers.ranks import Ranks

CPU, VOCABULARY = torch.device("cpu"), 101  # 128 rows with the padding
GPT = ("model=tiny", "model.hidden_size=36", "model.num_heads=4", "model.num_layers=2", "model.context_length=16")
LLAMA = ("model=llama_tiny", "model.num_layers=2", "model.context_length=16")
ALIBI = (*LLAMA, "model.position=alibi", "model.rope_theta=null", "model.fused_qkv=true")
LORA = ("lora=lora", "lora.rank=3", "lora.targets=[all-linear,embeddings]")
CLASSES = ("objective=classification", "data=labelled", "data.path=none.jsonl")
STARTS = {
    "gpt": GPT,
    "gpt untied, values of torch": (*GPT, "model.tie_embeddings=false", "model.initialisation=torch"),
    "llama": LLAMA,
    "llama with alibi": ALIBI,
    "classifier": (*GPT, *CLASSES),
}


def build(run: Run, *, has_memory: bool, load_weights: bool = True) -> TrainingUnit:
    labels, weights = (("a", "b", "c"), (0.5, 1.0, 2.0)) if not run.objective.generates else ((), ())
    return build_unit(
        run, VOCABULARY, labels, CPU, NamedGenerators(5), load_weights=load_weights, class_weights=weights,
        precision=run.precision.build(CPU), has_memory=has_memory,
    )  # fmt: skip


def share(run: Run, unit: TrainingUnit, world: World, **degrees: int) -> Parallel:
    """Share ``unit`` by a mesh, as :func:`llmtrain.distributed.share.share_unit` does."""
    sizes = {"pipeline": 1, "replicate": 1, "shard": 1, "tensor": 1} | degrees
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if sizes["pipeline"] > 1:
        return Pipeline(unit, world, mesh, run.distributed)
    if sizes["tensor"] == 1:
        return share_data(run.distributed, unit, world, mesh)
    cut = UnitCut(unit, TensorGroup(mesh.get_group("tensor")), sequence_parallel=False)
    return TensorParallel(share_data(run.distributed, unit, world, mesh), cut)


def start(world: World, overrides: list[str], degrees: dict[str, int], is_resumed: bool = False) -> dict[str, Any]:
    """Compare this rank's start with the one of a process alone; the losses of both on one batch."""
    run = Run.compose(*overrides)
    alone = build(run, has_memory=True)
    parallel = share(run, build(run, has_memory=False), world, **degrees)
    unit = parallel.unit
    for weight in dict(parallel.trainable.named_weights()).values():
        weight.data.fill_(torch.nan)
    fill_own_parts(run, parallel, NamedGenerators(5), load_weights=not is_resumed)
    whole, own, different = dict(alone.named_weights()), own_parts(parallel), []
    elements = 0
    for name in own:
        for part in own.within(name, tuple(whole[name].shape)):
            elements += part.tensor.numel()
            if not torch.equal(part.tensor, whole[name].detach()[part.box.slices_in(part.box._replace(
                offset=(0,) * part.tensor.dim(), shape=part.whole))]):  # fmt: skip
                different.append(name)
    losses = []
    if run.objective.generates and "pipeline" not in degrees:
        batch = make_batch(2, 1)
        losses = [unit.eval()(batch)["next_token"].item(), alone.eval()(batch)["next_token"].item()]
    return {
        "different": different, "names": list(own.shapes()) == list(whole), "elements": elements, "losses": losses,
        "all": sum(weight.numel() for weight in whole.values()),
        "meta": [name for name, buffer in unit.named_buffers() if buffer.is_meta],
        "buffers": sorted(name for name, _ in unit.named_buffers())
        == sorted(name for name, _ in alone.named_buffers()),
    }  # fmt: skip


def check(results: list[dict[str, Any]], *, bits: bool) -> None:
    for result in results:
        assert result["different"] == [], results
        assert (result["names"], result["meta"], result["buffers"]) == (True, [], True), results
        assert result["elements"] < 0.8 * result["all"]
        if result["losses"]:
            assert result["losses"][0] == (
                result["losses"][1] if bits else pytest.approx(result["losses"][1], rel=1e-6)
            )


@pytest.mark.parametrize("kind", STARTS)
def test_two_ranks_start_with_the_values_of_one_process(two: Ranks, kind: str) -> None:
    check(two.run(start, STARTS[kind], {"shard": 2}), bits=True)


@pytest.mark.parametrize("kind", ["gpt", "gpt untied, values of torch", "llama with alibi"])
def test_a_tensor_group_starts_with_the_values_of_one_process(two: Ranks, kind: str) -> None:
    check(two.run(start, STARTS[kind], {"tensor": 2}), bits=False)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_stages_start_with_the_values_of_one_process(two: Ranks, kind: str) -> None:
    check(two.run(start, STARTS[kind], {"pipeline": 2}), bits=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [{"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}, {"shard": 4}, {"pipeline": 2, "shard": 2}],
    ids=str,
)
def test_any_mesh_of_four_starts_with_the_values_of_one_process(four: Ranks, degrees: dict[str, int]) -> None:
    check(four.run(start, STARTS["llama"], degrees), bits="tensor" not in degrees)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of ours and a Hugging Face directory, of the GPT that is called gpt."""
    unit = build(Run.compose(*GPT), has_memory=True)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.mul_(1.5)
    unit.load_weights(unit.weights_state(), strict=True)  # padding is 0
    folder = tmp_path_factory.mktemp("weights")
    state = {"step": 1, "tokens": 0, "base": ""}
    (folder / "step-00000001").parent.mkdir(exist_ok=True)
    write_checkpoint(
        folder / "step-00000001", model=unit.weights_state(), optimizer={"none/step": torch.tensor(1)}, state=state,
        config="{}\n",
    )  # fmt: skip
    values = config_json(unit, torch.float32, {}, (), False)
    directory = folder / "published"
    directory.mkdir()
    write_directory(unit, directory, values, {}, dtype=torch.float32, shard_bytes=1 << 20)
    return folder / "step-00000001", directory


@pytest.mark.parametrize(("source", "extra"), [(0, ()), (1, ()), (1, LORA)])
@pytest.mark.parametrize("degrees", [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}])
def test_ranks_load_their_parts_of_weights(
    two: Ranks, published: tuple[Path, Path], source: int, extra: tuple[str, ...], degrees: dict[str, int]
) -> None:
    if extra and "pipeline" in degrees:
        extra = (*extra, "lora.targets=[all-linear]")  # a tied embedding is refused
    option = ("checkpoint", "huggingface")[source]
    keys = (*GPT, f"weights={option}", f"weights.path={published[source]}", *extra)
    check(two.run(start, keys, degrees), bits="shard" in degrees)


def peak(world: World, overrides: list[str]) -> dict[str, int]:
    """The memory that this rank takes at most for its start, and sizes, in bytes."""
    for layers in (1, 12):  # the first start imports what it needs
        run = Run.compose(*overrides, f"model.num_layers={layers}")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is now
        before = memory()
        parallel = share(run, build(run, has_memory=False), world, shard=world.size)
        fill_own_parts(run, parallel, NamedGenerators(5), load_weights=True)
    sizes = [weight.nbytes for _, weight in parallel.trainable.named_weights()]
    return {"peak": memory() - before, "shard": sum(sizes), "largest": world.size * max(sizes)}


def memory() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def test_a_rank_starts_in_the_memory_of_its_shard_and_one_parameter(two: Ranks) -> None:
    overrides = ("model=tiny", "model.hidden_size=512", "model.num_heads=8")
    for result in two.run(peak, overrides):
        assert result["shard"] > 70e6  # the whole unit: over 140 MB
        assert result["peak"] < result["shard"] + result["largest"] + 8e6, result


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("distributed=fsdp",), True),
        (("distributed=tensor",), True),
        (("distributed=pipeline",), True),
        (("distributed=local_sgd",), False),
        (("distributed=ddp",), False),
        (("distributed=fsdp", "weights=huggingface", "weights.path=x", "lora=lora"), True),
        (("distributed=fsdp", "weights=huggingface", "weights.path=x", "lora=dora"), False),
        (("distributed=ddp", "weights=huggingface", "weights.path=x", "lora=lora", "lora.quantization=nf4"), False),
        (("distributed=fsdp", "weights=huggingface", "weights.path=x", "lora=lora", "lora.path=x"), False),
    ],
)
def test_whole_weights_are_built_where_values_depend_on_them(keys: tuple[str, ...], expected: bool) -> None:
    class Two(World):
        rank, size = 0, 2

    Two.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    assert builds_parts(Run.compose("model=tiny", *keys), Two()) is expected  # type: ignore[abstract]


def test_a_head_without_a_rule_is_no_start_by_parts() -> None:
    unit = build(Run.compose(*GPT), has_memory=False)
    assert knows_values(unit)
    unit.extra = torch.nn.Linear(3, 2, device="meta")  # type: ignore[assignment]
    assert not knows_values(unit)
