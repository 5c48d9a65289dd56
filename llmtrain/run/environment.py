"""The facts of `environment.json`: versions, hardware, commit, command."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.base.device import device_name

if TYPE_CHECKING:
    import torch


def describe_environment(device: torch.device, command: list[str], processes: int = 1) -> dict[str, Any]:
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
        "directory": str(Path.cwd()),  # relative paths of the config start here
        "git_commit": git_commit(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device_name(device),
        "processes": processes,
        "cpus": os.cpu_count(),
    }


def difference_of_machine(environment: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """The reason why steps may give other bits here than where the run was trained last; None if they must not.

    ``environment`` is that of the run with its resumes, None where it has none; ``now`` the present one.  A processor,
    another number of its threads, a GPU and a version of torch decide the order in which numbers are added up.
    """
    if environment is None:
        return None
    latest = _latest(environment)
    device, torch = latest.get("device"), latest.get("versions", {}).get("torch")
    if latest["processes"] != now.get("processes", 1):
        return f"the number of processes was {latest['processes']}, and is {now.get('processes', 1)} here"
    if device is not None and _current_name(device) != now["device"]:
        return f"the run used {device}, this is {now['device']}"
    if torch is not None and torch != now["versions"]["torch"]:
        return f"the run used torch {torch}, this is {now['versions']['torch']}"
    return None


def processes_of(environment: Mapping[str, Any] | None) -> int:
    """The number of processes that a run was trained by last."""
    return 1 if environment is None else int(_latest(environment)["processes"])


def _latest(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The device, versions and processes that a run was trained with last, by its environment with its resumes."""
    latest: dict[str, Any] = {"processes": 1}
    for entry in (environment, *environment.get("resumes", [])):
        latest |= {"processes": 1} | {key: entry[key] for key in ("device", "versions", "processes") if key in entry}
    return latest


def _current_name(device: str) -> str:
    """A recorded name of a device as it is written today; earlier versions wrote "1 threads"."""
    return device.removesuffix("s") if device.endswith(", 1 threads") else device


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
