"""The facts of `environment.json`: versions, hardware, commit, command."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.base.device import device_name

if TYPE_CHECKING:
    import torch


def describe_environment(device: torch.device, command: list[str]) -> dict[str, Any]:
    """The content of ``environment.json``, with which a run can be understood and repeated elsewhere."""
    import importlib.metadata as metadata

    packages = ("llmtrain", "torch", "numpy", "safetensors", "tiktoken", "hydra-core", "omegaconf")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "git_commit": git_commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device_name(device),
        "cpus": os.cpu_count(),
    }


def git_commit(directory: Path) -> str | None:
    """The commit that ``directory`` is a checkout of, with "+changes" if it was edited since; None outside of git."""
    import subprocess

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
