"""The program: ``llmtrain`` and ``python -m llmtrain``."""

import sys

from llmtrain.base.process import restart_with_tunables

TRAINING = ("train", "resume", "plan", "verify")  # verbs that do training steps


def run() -> int:
    """The command line of this process; returns the exit status."""
    if any(verb in sys.argv[1:] for verb in TRAINING):
        restart_with_tunables()  # before anything else is imported
    from llmtrain.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
