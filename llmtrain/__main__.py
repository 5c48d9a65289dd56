"""The program: ``llmtrain`` and ``python -m llmtrain``."""

import sys

from llmtrain.base.streams import open_standard_streams
from llmtrain.cli.start import restart_if_needed


def run() -> int:
    """Run the command line of this process; returns the exit status."""
    open_standard_streams()
    restart_if_needed(sys.argv[1:])  # before anything else is imported
    from llmtrain.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
