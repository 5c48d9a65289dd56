"""``llmtrain train``: train a composed run from step 0."""

from llmtrain.base.invocation import FINISHED, INTERRUPTED, Invocation
from llmtrain.commands.ranks import start_ranks
from llmtrain.run.run import Run


def main(run: Run, invocation: Invocation) -> int:
    """Train ``run``; return the exit status."""
    if (status := start_ranks(run, invocation)) is not None:
        return status
    result = run.train(command=invocation.command)
    return FINISHED if result.exit_reason == "finished" else INTERRUPTED
