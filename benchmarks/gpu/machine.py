"""The machine in a line of JSON, from a process of its own: ``python -m benchmarks.gpu.machine``."""

import json
import os
import platform
from pathlib import Path


def describe() -> dict[str, object]:
    """Names, versions and the bf16 peak of the data sheet."""
    import torch

    from llmtrain.base.device import device_name
    from llmtrain.base.gpus import find_gpu
    from llmtrain.run.environment import git_commit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return {
        "name": device_name(device), "device": device.type, "cores": os.cpu_count(), "torch": torch.__version__,
        "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(), "commit": git_commit(Path(__file__).parent),
        "peak_flops": known.flops.get("bf16") if known else None,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(describe()))
