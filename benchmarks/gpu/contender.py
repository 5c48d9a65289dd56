"""A worker of `benchmarks` in an empty folder of its own: ``python -m benchmarks.gpu.contender WORKER TASK``."""

import os
import runpy
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.task import Task


def main() -> None:
    """Run the worker, and remove what it wrote: a checkpoint of 1558M has 19 GB."""
    name, task = sys.argv[1], replace(Task.from_json(sys.argv[2]), launched=time.time())
    folder = Path(task.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    sys.argv = [name, task.to_json()]
    try:
        runpy.run_module(f"benchmarks.workers.{name}", run_name="__main__")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
