"""What a checkpoint costs training."""

from benchmarks.measurement import Measurement
from benchmarks.suites import Column, Setup, Suite, figure, gigabytes


def plan(setup: Setup) -> list[list[Measurement]]:
    """One process of ours for all kinds of saves, and torch.save beside it."""
    steps = setup.settings.save_every
    task = setup.task_for(setup.settings.modes[0], steps=steps)
    return [
        [
            setup.ours("checkpoint", f"every {steps} steps", task, "ours", worker="checkpoints"),
            setup.ours("checkpoint", f"every {steps} steps", task, "torch.save alone", worker="torch_save"),
        ]
    ]


SUITE = Suite(
    "checkpoint", "Cost of a checkpoint",
    "Blocks of steps with no save, with one behind training's back and with one that training waits for, in turns in "
    "one process, in the first of the modes. Ours hashes, syncs and reads back what it writes; `torch.save` of tensors "
    "of the same shapes does not.",
    plan, (
        Column("step, s", figure("step_seconds"), "{:.3f}".format),
        Column("training held, s", figure("held_seconds"), "{:.3f}".format),
        Column("save in all, s", figure("save_seconds"), "{:.2f}".format),
        Column("GB", figure("bytes"), gigabytes),
    ), reference="none", comparison="slower than without by", more_is_better=False,
)  # fmt: skip
