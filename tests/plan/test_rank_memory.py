"""The memory of a rank: literal numbers, and facts that must hold."""

from llmtrain.plan.mesh import Mesh
from llmtrain.plan.program import Program, Recomputation, Work
from llmtrain.plan.rank_memory import kept_bytes, rank_memory
from llmtrain.plan.shape import Shape

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, True, 128256, False, 8192, 4096)
WORK = Work(sequence_length=8192, micro_batch=1, micro_batches=8)
PARAMETERS = 8_030_261_248


def test_weights_gradients_and_state_by_hand() -> None:
    parts = rank_memory(LLAMA_8B, Mesh(), WORK, Program()).parts
    assert parts["weights"] == parts["gradients"] == 4 * PARAMETERS
    assert parts["optimizer"] == 8 * PARAMETERS
    assert parts["gathered"] == 0
    shared = rank_memory(LLAMA_8B, Mesh(shard=8), WORK, Program()).parts
    assert shared["weights"] == shared["gradients"] == PARAMETERS // 2
    assert shared["optimizer"] == PARAMETERS
    # two blocks and the embeddings in bf16, a block's gradient in bf16 and as it is sent in fp32
    outer = 2 * 128256 * 4096 + 4096
    assert shared["gathered"] == 2 * (2 * 218_112_000 + outer) + 6 * 218_112_000


def test_gradients_that_are_added_up_before_they_are_sent_are_whole() -> None:
    program = Program(reduces_every_micro_batch=False)
    assert rank_memory(LLAMA_8B, Mesh(shard=8), WORK, program).parts["gradients"] == 4 * PARAMETERS
    once = Work(8192, 1, 1)
    assert rank_memory(LLAMA_8B, Mesh(shard=8), once, program).parts["gradients"] == PARAMETERS // 2


def test_full_recomputation_keeps_the_input_of_each_block() -> None:
    parts = rank_memory(LLAMA_8B, Mesh(), WORK, Program(recomputation=Recomputation.full)).parts
    assert parts["activations"] == 32 * 8192 * 4096 * 2


def test_each_option_keeps_less_than_the_one_before() -> None:
    kept = [kept_bytes(LLAMA_8B, Program(recomputation=option)) for option in Recomputation]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


def test_memory_falls_with_every_kind_of_sharing() -> None:
    def peaks(name: str) -> list[int]:
        return [rank_memory(LLAMA_8B, Mesh(**{name: degree}), WORK, Program()).peak for degree in (1, 2, 4, 8)]

    for name in ("shard", "tensor"):
        found = peaks(name)
        assert found == sorted(found, reverse=True), name
        assert found[0] > 2 * found[-1]
    assert len(set(peaks("replicate"))) == 1


def test_weights_and_state_fall_as_the_number_of_shards() -> None:
    for degree in (2, 4, 64):
        parts = rank_memory(LLAMA_8B, Mesh(shard=degree), WORK, Program()).parts
        assert abs(parts["weights"] * degree - 4 * PARAMETERS) < degree
        assert abs(parts["optimizer"] * degree - 8 * PARAMETERS) < degree


def test_the_first_stage_of_a_pipeline_holds_a_micro_batch_for_each_stage() -> None:
    kept = 8192 * kept_bytes(LLAMA_8B, Program())
    parts = rank_memory(LLAMA_8B, Mesh(pipeline=4), WORK, Program()).parts
    assert parts["activations"] == 4 * 8 * kept  # 4 micro-batches of 8 blocks
    few = Work(8192, 1, 2)
    assert rank_memory(LLAMA_8B, Mesh(pipeline=4), few, Program()).parts["activations"] == 2 * 8 * kept


def test_positions_that_ranks_share_divide_activations_but_not_keys_and_values() -> None:
    def activations(context: int, **keys: Recomputation) -> int:
        work = Work(sequence_length=8192, micro_batch=1, micro_batches=8, context=context)
        return rank_memory(LLAMA_8B, Mesh(context=context), work, Program(**keys)).parts["activations"]

    assert activations(4, recomputation=Recomputation.full) * 4 == activations(1, recomputation=Recomputation.full)
    keys_and_values = 32 * 2 * 1024 * 2 * 8192  # layers, both, 8 heads of 128, bytes, tokens
    assert activations(4) == activations(1) // 4 + keys_and_values * 3 // 4


def test_weights_are_whole_on_ranks_that_share_positions_alone() -> None:
    work = Work(8192, 1, 8, context=4)
    assert rank_memory(LLAMA_8B, Mesh(context=4), work, Program()).parts["weights"] == 4 * PARAMETERS
    divided = rank_memory(LLAMA_8B, Mesh(shard=2, context=4), work, Program()).parts
    assert divided["weights"] == 4 * PARAMETERS // 8
