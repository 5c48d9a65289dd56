"""Config-driven training of language models."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["Run", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Run":  # lazily: ``llmtrain --help`` must not import torch
        from llmtrain.run.run import Run

        return Run
    raise AttributeError(f"module 'llmtrain' has no attribute {name!r}")
