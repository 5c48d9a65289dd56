"""Settings that a pipeline refuses before anything starts, and the micro-batches that its schedules need."""

from dataclasses import replace

import pytest

from llmtrain.distributed.pipeline_options import PipelineSettings, passes_needed, pipeline_problems

SETTINGS = PipelineSettings(
    degree=2, schedule="1f1b", stages_per_process=1, num_layers=4, shard=1, tensor=1, context=1, sequences=8,
    micro_batch_size=2, is_probed=False, compiles=False, keeps_operations=False,
)  # fmt: skip


def test_micro_batches_are_as_many_as_a_schedule_can_run() -> None:
    assert [passes_needed("gpipe", 4, n) for n in (1, 3, 5)] == [1, 3, 5]
    assert [passes_needed("1f1b", 4, n) for n in (1, 4, 5)] == [4, 4, 5]
    assert [passes_needed("interleaved", 4, n) for n in (1, 4, 7, 8, 9, 11)] == [1, 4, 7, 8, 10, 12]
    assert [passes_needed("zero_bubble", 2, n) for n in (1, 3, 4, 5)] == [1, 3, 4, 6]


def test_fitting_settings_have_no_problems() -> None:
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble"):
        assert list(pipeline_problems(replace(SETTINGS, schedule=schedule))) == []
    assert list(pipeline_problems(replace(SETTINGS, schedule="interleaved", stages_per_process=2, shard=2))) == []


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        ({"tensor": 2}, "distributed.tensor=2", "distributed.shard=2"),
        ({"context": 4}, "distributed.context=4", "distributed.shard=4"),
        ({"stages_per_process": 2}, "distributed.stages_per_process=2", "pipeline_schedule=interleaved or zero_bubble"),
        ({"degree": 8, "sequences": 64}, "8 stages for a model of 4 layers", "a pipeline of at most 4"),
        ({"is_probed": True}, "accumulation=auto", "accumulation=fixed"),
        ({"micro_batch_size": 8}, "makes 1 micro-batch of a step's 8 sequences", "accumulation.micro_batch_size=4"),
        ({"sequences": 1}, "needs 2 at least", "take larger steps, or distributed.pipeline_schedule=gpipe"),
        ({"schedule": "zero_bubble", "shard": 2}, "distributed.shard=2", "replicate=2"),
        ({"schedule": "zero_bubble", "compiles": True}, "runtime.compile=True", "runtime.compile=false"),
        ({"schedule": "zero_bubble", "keeps_operations": True}, "by=operation", "activation_checkpointing.by=block"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_a_remedy(
    change: dict[str, object], problem: str, remedy: str
) -> None:
    (found,) = pipeline_problems(replace(SETTINGS, **change))  # type: ignore[arg-type]
    assert problem in found
    assert remedy in found
