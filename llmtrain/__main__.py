"""The program: ``llmtrain`` and ``python -m llmtrain``."""

import sys

from llmtrain.cli.start import restart_if_needed


def run() -> int:
    """Run the command line of this process; returns the exit status."""
    restart_if_needed(sys.argv[1:])  # before anything else is imported
    from llmtrain.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
