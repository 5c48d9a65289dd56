"""``distributed=deepspeed``: ZeRO by DeepSpeed, with its own JSON or the stage alone.

Importing this module imports neither torch nor deepspeed.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.base.checks import where
from llmtrain.base.stored_files import StoredFileError, parse_json_object, read_text_file
from llmtrain.distributed.deepspeed_json import check_keys, taken
from llmtrain.distributed.options import Distributed, Mesh

VERSION = "0.19.8"  # whose internals llmtrain.distributed.zero_partitions builds on
INSTALL = "pip install 'llmtrain[deepspeed]'"
MISSING = f"distributed=deepspeed: the package deepspeed is not installed; {INSTALL}, or take distributed=fsdp"
DEFAULT_STAGE = 2
MAX_BYTES = 1 << 20
OTHER_DEGREES = {"pipeline": "pipeline", "replicate": "ddp or hsdp", "context": "fsdp", "tensor": "tensor"}


@dataclass(frozen=True)
class DeepSpeed(Distributed):
    """All ranks divide optimizer state (stage 1), gradients (2) and weights (3) among them, as DeepSpeed does it.

    ``config``: DeepSpeed's JSON, as text; what composes a run puts the content of a file in the place of its name.
    """

    zero_stage: int | None
    config: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, option in OTHER_DEGREES.items():
            if (degree := getattr(self, key)) != 1:
                raise ValueError(
                    f"{key}={degree}: DeepSpeed divides over all processes alone; {key}=1, or take distributed={option}"
                )
        if self.shard == 1:
            raise ValueError("shard=1: DeepSpeed divides over all processes; shard=-1")
        if not self.reshard_after_forward:
            raise ValueError(
                "reshard_after_forward=false: DeepSpeed keeps gathered weights as its JSON says; remove it, or give "
                "stage3_max_live_parameters and stage3_max_reuse_distance in distributed.config"
            )
        if self.zero_stage not in (None, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage}: must be 1, 2 or 3; distributed=ddp divides nothing")
        check_keys(self.given)
        stage = self._given_stage
        if None not in (stage, self.zero_stage) and stage != self.zero_stage:
            raise ValueError(
                f"config: zero_optimization.stage={stage}, and zero_stage={self.zero_stage}; take zero_stage={stage}, "
                'or "auto" in the JSON'
            )

    @cached_property
    def given(self) -> dict[str, Any]:
        """The JSON that was given; {} for none."""
        if self.config is None:
            return {}
        if not self.config.lstrip().startswith("{"):
            raise ValueError(f"config={self.config}: not DeepSpeed's JSON, an object, and no file that was read")
        return parse(self.config, "config")

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return self._given_stage or self.zero_stage or DEFAULT_STAGE

    @property
    def _given_stage(self) -> int | None:
        stage = (self.given.get("zero_optimization") or {}).get("stage")
        return stage if isinstance(stage, int) else None

    def settings(self) -> dict[str, Any]:
        """The JSON that DeepSpeed is given: what it alone decides; batches, rates and updates are ours."""
        own = taken(self.given)
        reports = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger")
        level = {"log_level": "info"} if any(own.get(key) for key in reports) else {}
        return {
            **level, **own, "zero_optimization": {**own["zero_optimization"], "stage": self.stage},
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},
        }  # fmt: skip

    def mesh(self, size: int) -> Mesh:
        if size == 1:
            raise ValueError(
                "distributed=deepspeed: one process has nothing to divide; distributed.processes=2 on this machine, or "
                "take distributed=none, which trains the same"
            )
        return super().mesh(size)


def parse(text: str, where_: str) -> dict[str, Any]:
    """Parse DeepSpeed's JSON.  Raises ValueError that begins with ``where_``."""
    try:
        return parse_json_object(text, where_, "the JSON of DeepSpeed, an object of its keys")
    except StoredFileError as error:
        raise ValueError(str(error)) from error


def read_config(path: str) -> str:
    """The content of a file with DeepSpeed's JSON, as one line.  Raises ValueError that begins with the key."""
    file = Path(path).expanduser()
    if not file.is_file():
        reason = "a folder; name a file" if file.is_dir() else f"no such file{where(path)}"
        raise ValueError(f"config={path}: {reason}")
    try:
        text = read_text_file(file, MAX_BYTES)
    except (OSError, StoredFileError) as error:
        raise ValueError(f"config={path}: {error}") from error
    return json.dumps(parse(text, f"config={path}"))


def check_installed() -> None:
    """Raise ValueError if DeepSpeed is not installed; does not import it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(MISSING)


def check_version(installed: str) -> None:
    """Raise ValueError for another version than the one that is tested."""
    if installed != VERSION:
        raise ValueError(f"distributed=deepspeed: works with deepspeed {VERSION}, {installed} is installed; {INSTALL}")
