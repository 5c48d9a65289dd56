"""Published speeds of training runs on clusters, with the settings that their sources state."""

from dataclasses import dataclass, replace

from llmtrain.plan.links import Links, Network, links_of
from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.shape import Shape

FOUNDRY = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md (8c8dd48f7)"
TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
FORGE = "github.com/KempnerInstitute/KempnerForge, benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md and mfu_bench.sh"
FORGE_WEAK = "github.com/KempnerInstitute/KempnerForge, benchmarks/weak_scaling_160gpu/README.md"


@dataclass(frozen=True)
class PublishedRun:
    """A published speed and the settings of its run."""

    name: str
    source: str
    is_wanted: bool  # one of the rows that the rates are fitted to; the others were not used for it
    shape: Shape
    mesh: Mesh
    work: Work
    program: Program
    device: str  # of the table
    links: Links
    tokens_per_second: float  # of a device
    memory_gib: float | None = None
    power: float = 1.0  # power limit, relative to full power
    peak_scale: float = 1.0  # of the peak of a variant, relative to the table's device
    bandwidth: float | None = None  # of a variant's memory, bytes per second; None: the table's


def mpt(hidden: int, layers: int, heads: int) -> Shape:
    """The sizes of an MPT model: GPT-2's blocks, tied embeddings of 50,368 rows, 2,048 positions, biases."""
    vectors = 4 * hidden + 9 * hidden
    return Shape(
        layers, hidden, heads, heads, hidden // heads, 4 * hidden, False, 50368, True, vectors, (2048 + 2) * hidden
    )  # fmt: skip


def llama(hidden: int, layers: int, heads: int, inner: int) -> Shape:
    """The sizes of a Llama 3 model."""
    return Shape(layers, hidden, heads, 8, hidden // heads, inner, True, 128256, False, 2 * hidden, hidden)


# scripts/train/yamls/pretrain/mpt-*.yaml
MPT = {
    "125m": mpt(768, 12, 12), "350m": mpt(1024, 24, 16), "760m": mpt(1536, 24, 12), "1b": mpt(2048, 24, 16),
    "3b": mpt(2560, 32, 20), "7b": mpt(4096, 32, 32), "13b": mpt(5120, 40, 40), "30b": mpt(7168, 48, 56),
    "70b": mpt(8192, 80, 64),
}  # fmt: skip
LLAMA_8B, LLAMA_70B = llama(4096, 32, 32, 14336), llama(8192, 80, 64, 28672)
LLAMA_13B = llama(5120, 40, 40, 17920)  # KempnerForge's own size

# Composer's FSDP (version 1) without compiled blocks; mixed_precision DEFAULT gathers in bf16 and reduces in fp32, PURE
# reduces in bf16 too (composer/trainer/mosaic_fsdp_utils.py).  MPT's loss is FlashAttention's fused cross-entropy, the
# backward pass of which overwrites the logits (llmfoundry/models/mpt/modeling_mpt.py).
FOUNDRY_PROGRAM = Program(is_compiled=False, logit_bytes=2)
# FSDP2, weights and state in fp32, blocks compiled, every second product recomputed ("op"); in the loss's backward pass
# log-probabilities, their gradient and the logits' gradient in fp32; at commit 9dec370.
TITAN_PROGRAM = Program(recomputation=Recomputation.alternate, logit_bytes=12)
# Weights, gradients and state in bf16; the whole model compiled as one graph, so that the gradients of a micro-batch
# are new tensors beside those that are added up; no exchange before the last micro-batch; logits four times in bf16.
# Under tensor parallelism the embedding is whole, each projection gathers its own input (3 + 2 in a block), and the
# logits are gathered; at commit 01b461a.
FORGE_PROGRAM = Program(
    weight_bytes=2, state_bytes=4, gradient_bytes=2, recomputation=Recomputation.full, logit_bytes=8,
    reduces_every_micro_batch=False, holds_new_gradients=True, block_gathers=5, gathers_logits=True,
    splits_embedding=False, optimizer_traffic=16,
)  # fmt: skip

# model, GPUs, device, micro-batch, micro-batches of a step, tokens/s a GPU, PURE, FULL_SHARD (else SHARD_GRAD_OP), full
# recomputation; sequences of 2,048 tokens
WANTED_MPT = (
    ("70b", 128, "h100-80gb", 8, 1, 1058, False, True, True),
    ("7b", 512, "h100-80gb", 6, 1, 9670, False, True, False),
    ("7b", 256, "h100-80gb", 6, 1, 10119, False, True, False),
    ("7b", 128, "h100-80gb", 6, 1, 10475, False, True, False),
    ("1b", 512, "h100-80gb", 12, 1, 39837, False, False, False),
    ("1b", 128, "h100-80gb", 12, 1, 44123, False, False, False),
    ("1b", 64, "h100-80gb", 20, 1, 44402, False, True, False),
    ("1b", 8, "h100-80gb", 14, 1, 45455, False, True, False),
    ("125m", 8, "a100-40gb", 26, 3, 136334, True, True, False),
)
OTHER_MPT = (
    ("70b", 512, "h100-80gb", 8, 1, 1007, False, True, True),
    ("70b", 256, "h100-80gb", 8, 1, 1035, False, True, True),
    ("30b", 512, "h100-80gb", 8, 1, 2115, False, True, True),
    ("30b", 256, "h100-80gb", 8, 1, 2148, False, True, True),
    ("30b", 128, "h100-80gb", 8, 1, 2199, False, True, True),
    ("13b", 512, "h100-80gb", 16, 1, 4952, False, True, True),
    ("13b", 256, "h100-80gb", 16, 1, 4989, False, True, True),
    ("13b", 128, "h100-80gb", 16, 1, 5080, False, True, True),
    ("3b", 512, "h100-80gb", 8, 1, 21664, False, False, False),
    ("3b", 256, "h100-80gb", 8, 1, 22772, False, False, False),
    ("3b", 128, "h100-80gb", 8, 1, 23422, False, False, False),
    ("1b", 256, "h100-80gb", 12, 1, 42555, False, False, False),
    ("70b", 64, "h100-80gb", 8, 4, 1039, False, True, True),
    ("70b", 32, "h100-80gb", 2, 16, 882, False, True, True),
    ("30b", 32, "h100-80gb", 14, 3, 2308, False, True, True),
    ("30b", 16, "h100-80gb", 10, 3, 2263, False, True, True),
    ("30b", 8, "h100-80gb", 3, 21, 2002, False, True, True),
    ("13b", 64, "h100-80gb", 2, 1, 4800, False, True, False),
    ("13b", 32, "h100-80gb", 2, 1, 4811, False, True, False),
    ("13b", 16, "h100-80gb", 2, 1, 4767, False, True, False),
    ("13b", 8, "h100-80gb", 2, 1, 4792, False, True, False),
    ("7b", 8, "h100-80gb", 6, 1, 10643, False, True, False),
    ("3b", 64, "h100-80gb", 6, 3, 22525, False, True, False),
    ("3b", 32, "h100-80gb", 6, 3, 23021, False, True, False),
    ("3b", 16, "h100-80gb", 10, 3, 24142, False, True, False),
    ("1b", 32, "h100-80gb", 20, 1, 45130, False, True, False),
    ("1b", 16, "h100-80gb", 20, 1, 46037, False, True, False),
    ("760m", 32, "h100-80gb", 24, 1, 67971, False, True, False),
    ("760m", 16, "h100-80gb", 24, 1, 68551, False, True, False),
    ("760m", 8, "h100-80gb", 24, 2, 63147, False, True, False),
    ("70b", 64, "a100-80gb", 8, 4, 410, True, True, True),
    ("70b", 32, "a100-80gb", 2, 16, 373, True, True, True),
    ("30b", 8, "a100-80gb", 3, 21, 916, False, True, True),
    ("13b", 8, "a100-80gb", 2, 3, 2262, False, True, False),
    ("7b", 8, "a100-80gb", 6, 2, 4641, False, True, False),
    ("3b", 8, "a100-80gb", 10, 2, 10811, False, True, False),
    ("1b", 8, "a100-80gb", 14, 4, 20513, False, True, False),
    ("760m", 8, "a100-80gb", 24, 2, 32434, False, True, False),
    ("350m", 8, "a100-80gb", 32, 2, 58782, False, True, False),
    ("125m", 8, "a100-80gb", 40, 2, 142830, False, True, False),
    ("125m", 8, "a100-80gb", 32, 2, 141737, False, True, False),
    ("70b", 128, "a100-40gb", 4, 1, 376, True, True, True),
    ("70b", 64, "a100-40gb", 2, 1, 276, True, True, True),
    ("30b", 128, "a100-40gb", 6, 1, 865, True, True, True),
    ("30b", 32, "a100-40gb", 4, 1, 857, True, True, True),
    ("13b", 128, "a100-40gb", 16, 1, 1972, True, True, True),
    ("13b", 64, "a100-40gb", 16, 1, 1976, True, True, True),
    ("13b", 32, "a100-40gb", 14, 1, 1998, True, True, True),
    ("13b", 16, "a100-40gb", 10, 1, 1993, True, True, True),
    ("13b", 8, "a100-40gb", 4, 16, 1668, True, True, True),
    ("7b", 128, "a100-40gb", 18, 1, 3623, True, True, True),
    ("7b", 64, "a100-40gb", 18, 1, 3665, True, True, True),
    ("7b", 32, "a100-40gb", 18, 1, 3725, True, True, True),
    ("7b", 16, "a100-40gb", 16, 1, 3645, True, True, True),
    ("7b", 8, "a100-40gb", 12, 4, 3679, True, True, True),
    ("3b", 128, "a100-40gb", 6, 1, 9538, True, True, False),
    ("3b", 64, "a100-40gb", 6, 1, 9736, True, True, False),
    ("3b", 32, "a100-40gb", 6, 1, 9914, True, True, False),
    ("3b", 16, "a100-40gb", 5, 1, 9750, True, True, False),
    ("3b", 8, "a100-40gb", 5, 8, 10065, True, True, False),
    ("1b", 128, "a100-40gb", 10, 1, 18647, True, True, False),
    ("1b", 64, "a100-40gb", 10, 1, 19001, True, True, False),
    ("1b", 32, "a100-40gb", 10, 1, 15555, True, True, False),
    ("1b", 16, "a100-40gb", 8, 1, 19085, True, True, False),
    ("1b", 8, "a100-40gb", 8, 8, 19271, True, True, False),
    ("760m", 128, "a100-40gb", 12, 1, 28940, True, True, False),
    ("760m", 64, "a100-40gb", 12, 1, 29344, True, True, False),
    ("760m", 32, "a100-40gb", 12, 1, 29648, True, True, False),
    ("760m", 16, "a100-40gb", 12, 1, 29607, True, True, False),
    ("760m", 8, "a100-40gb", 12, 4, 30173, True, True, False),
    ("350m", 128, "a100-40gb", 18, 1, 51934, True, True, False),
    ("350m", 64, "a100-40gb", 18, 1, 52689, True, True, False),
    ("350m", 32, "a100-40gb", 18, 1, 53811, True, True, False),
    ("350m", 16, "a100-40gb", 18, 1, 55413, True, True, False),
    ("350m", 8, "a100-40gb", 16, 4, 55995, True, True, False),
    ("125m", 128, "a100-40gb", 26, 1, 123936, True, True, False),
    ("125m", 64, "a100-40gb", 26, 1, 125234, True, True, False),
    ("125m", 32, "a100-40gb", 26, 1, 127122, True, True, False),
    ("125m", 16, "a100-40gb", 26, 1, 130535, True, True, False),
)
# GPUs of a host: 8.  A100: 1,600 Gbit/s RoCE a host, as the source says; of the H100 it says nothing: 3,200 as usual.
FOUNDRY_GIGABITS = {"h100-80gb": 400.0, "a100-80gb": 200.0, "a100-40gb": 200.0}

# shape, shard, tensor, micro-batch, micro-batches, tokens/s of all GPUs, GiB; 4 H200 a host, sequences of 4,096 tokens
WANTED_FORGE = (
    ("8B", LLAMA_8B, 1, 1, 2, 4, 10471, 80.7),
    ("8B", LLAMA_8B, 2, 1, 2, 4, 18728, 62.4),
    ("8B", LLAMA_8B, 4, 1, 4, 2, 38983, 61.1),
    ("8B", LLAMA_8B, 1, 4, 4, 2, 25135, 39.4),
    ("8B", LLAMA_8B, 2, 4, 4, 2, 44299, 32.7),
)
OTHER_FORGE = (
    ("8B", LLAMA_8B, 1, 2, 4, 2, 13163, 57.8),
    ("8B", LLAMA_8B, 2, 2, 4, 2, 25980, 45.9),
    ("8B", LLAMA_8B, 4, 4, 4, 2, 82988, 29.4),
    ("8B", LLAMA_8B, 8, 4, 4, 2, 155917, 27.6),
    ("13B", LLAMA_13B, 2, 4, 4, 4, 27345, 45.1),
    ("13B", LLAMA_13B, 4, 4, 4, 4, 53814, 39.2),
    ("13B", LLAMA_13B, 8, 4, 4, 4, 104309, 36.3),
    ("70B", LLAMA_70B, 8, 4, 2, 4, 17657, 93.2),
)
OTHER_FORGE_WEAK = (
    ("13B", LLAMA_13B, 2, 4, 4, 4, 29860, 45.0),
    ("13B", LLAMA_13B, 8, 4, 4, 4, 110373, 36.2),
    ("13B", LLAMA_13B, 16, 4, 4, 4, 216507, 34.8),
    ("13B", LLAMA_13B, 32, 4, 4, 4, 423306, 34.0),
    ("13B", LLAMA_13B, 40, 4, 4, 4, 534644, 33.9),
    ("70B", LLAMA_70B, 8, 4, 2, 4, 18688, 93.2),
    ("70B", LLAMA_70B, 16, 4, 2, 4, 35824, 86.8),
    ("70B", LLAMA_70B, 24, 4, 2, 4, 52190, 84.6),
    ("70B", LLAMA_70B, 32, 4, 2, 4, 69985, 83.6),
    ("70B", LLAMA_70B, 40, 4, 2, 4, 85571, 82.9),
)


def published_runs() -> list[PublishedRun]:
    """All rows: those that the rates are fitted to first."""
    runs = [foundry_run(row, is_wanted=True) for row in WANTED_MPT]
    runs += [titan_run(8, 6667, 77.0, is_compiled=True), titan_run(128, 6514, 62.0, is_compiled=True)]
    runs += [forge_run(row, FORGE, is_wanted=True) for row in WANTED_FORGE]
    runs += [foundry_run(row, is_wanted=False) for row in OTHER_MPT]
    runs += [titan_run(8, 5762, 82.4, is_compiled=False), titan_run(128, 5605, 67.0, is_compiled=False)]
    runs += [forge_run(row, FORGE, is_wanted=False) for row in OTHER_FORGE]
    # FSDP over two hosts without compiled blocks
    whole = forge_run(("13B", LLAMA_13B, 8, 1, 4, 4, 35405, 88.5), FORGE, is_wanted=False)
    runs.append(replace(whole, program=replace(FORGE_PROGRAM, is_compiled=False)))
    runs += [forge_run(row, FORGE_WEAK, is_wanted=False) for row in OTHER_FORGE_WEAK]
    return runs


def foundry_run(row: tuple[str, int, str, int, int, int, bool, bool, bool], *, is_wanted: bool) -> PublishedRun:
    """Build a run of llm-foundry's tables."""
    model, gpus, device, micro_batch, micro_batches, speed, is_pure, reshards, recomputes = row
    program = replace(
        FOUNDRY_PROGRAM, reshards=reshards, reduce_bytes=2 if is_pure else 4,
        recomputation=Recomputation.full if recomputes else Recomputation.none,
    )  # fmt: skip
    links = links_of(device, 8, Network.infiniband, None, FOUNDRY_GIGABITS[device])
    return PublishedRun(
        f"MPT {model}, {gpus} {device}, micro-batch {micro_batch}", FOUNDRY, is_wanted, MPT[model], Mesh(shard=gpus),
        Work(2048, micro_batch, micro_batches), program, device, links, speed,
    )  # fmt: skip


def titan_run(gpus: int, speed: int, memory: float, *, is_compiled: bool) -> PublishedRun:
    """Build a run of torchtitan's tables 1 and 3.

    An H100 of 96 GB with a limit of 500 W, 2.4 TB/s, and a peak between those of SXM and NVL, says the source: their
    mean.
    """
    program = replace(TITAN_PROGRAM, is_compiled=is_compiled)
    how = "compiled" if is_compiled else "not compiled"
    return PublishedRun(
        f"Llama 3.1 8B, {gpus} H100 (500 W), FSDP, {how}", TITAN, is_compiled, LLAMA_8B, Mesh(shard=gpus),
        Work(8192, 2, 1), program, "h100-80gb", links_of("h100-80gb", 8, Network.infiniband, None, 400.0), speed,
        memory, power=500 / 700, peak_scale=(989.4 + 835) / 2 / 989.4, bandwidth=2.4e12,
    )  # fmt: skip


def forge_run(
    row: tuple[str, Shape, int, int, int, int, int, float], source: str, *, is_wanted: bool
) -> PublishedRun:  # fmt: skip
    """Build a run of KempnerForge's tables."""
    name, shape, shard, tensor, micro_batch, micro_batches, speed, memory = row
    gpus = shard * tensor
    return PublishedRun(
        f"Llama {name}, {gpus} H200, TP {tensor} × FSDP {shard}", source, is_wanted, shape,
        Mesh(shard=shard, tensor=tensor), Work(4096, micro_batch, micro_batches), FORGE_PROGRAM, "h200-141gb",
        links_of("h200-141gb", 4, Network.infiniband, None, 400.0), speed / gpus, memory,
    )  # fmt: skip
