"""The failure of a run."""


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message explains.  Saved checkpoints are intact."""
