"""DeepSpeed's ZeRO through the command line, beside one process."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.distributed.test_runs import folder
from tests.distributed.whole_runs import RUN, TWO, assert_same_training, assert_same_validations, llmtrain

__all__ = ["folder"]  # a fixture

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'llmtrain[deepspeed]'",
)
CONFIG = {
    "train_batch_size": 5,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 1000},
}


@needs_deepspeed
def test_a_run_goes_on_without_its_json_and_without_deepspeed(folder: Path) -> None:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    words = ("distributed=deepspeed", "distributed.config=ds_config.json", TWO)
    llmtrain(folder, "train", "run_dir=zero", *RUN, "loop.max_steps=6", *words)
    path.unlink()
    parts = sorted(path.name for path in (folder / "zero" / "checkpoints" / "step-00000006").glob("model*"))
    assert parts == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    llmtrain(folder, "resume", "zero", "loop.max_steps=9")
    llmtrain(folder, "resume", "zero", "loop.max_steps=12", "distributed=none")
    assert_same_training(folder, "zero")
    assert_same_validations(folder, "zero")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_train_as_one_process(folder: Path, stage: int) -> None:
    run = f"zero{stage}"
    llmtrain(
        folder, "train", f"run_dir={run}", *RUN, "distributed=deepspeed", f"distributed.zero_stage={stage}", TWO
    )  # fmt: skip
    assert_same_training(folder, run)
    assert_same_validations(folder, run)
    llmtrain(folder, "verify", run)


@needs_deepspeed
def test_a_contradiction_starts_nothing(folder: Path) -> None:
    config = json.dumps({**CONFIG, "gradient_clipping": 0.5})
    done = llmtrain(
        folder, "train", "run_dir=contradiction", *RUN, "distributed=deepspeed", f"distributed.config={config}", TWO,
        check=2,
    )  # fmt: skip
    assert done.stderr.count("\n") == 1, done.stderr
    assert "gradient_clipping=0.5, and clipping.max_norm=1.0 here; take clipping.max_norm=0.5" in done.stderr
    assert not (folder / "contradiction").exists()
