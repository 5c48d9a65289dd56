"""Agreement of the ranks of a run on the stages of a save: each is done by all ranks, or fails on all."""

from collections.abc import Callable
from typing import Any, TypeVar

from llmtrain.base.tensor_files import CheckpointError
from llmtrain.base.world import World

T = TypeVar("T")


class RunDirectoryGone(Exception):
    """The directory of a run is no longer where the run found it."""


# The errors that a run tells apart after a save, by the names that they have between ranks; others are RuntimeError.
KINDS: dict[str, type[Exception]] = {
    "RunDirectoryGone": RunDirectoryGone, "CheckpointError": CheckpointError, "OSError": OSError,
}  # fmt: skip


class Agreement:
    """The stages of saves that the ranks of ``world`` make together, in the same order on every rank."""

    def __init__(self, world: World) -> None:
        self.world = world

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Call ``work()`` on every rank; return the results of all, as JSON holds them, in the order of ranks.

        If it fails on one rank, every rank raises an error of that kind, with the first such rank and its message.
        RuntimeError if a rank does not answer.
        """
        if self.world.size == 1:
            return [work()]
        value, error = None, None
        try:
            with self.world.saving():
                value = work()
        except Exception as failure:  # raised below, on every rank
            error = failure
        answer = {"value": value, "error": error and _describe(error), "host": self.world.host}
        try:
            answers = self.world.gather(answer)
        except Exception as lost:  # no error of the disk, after which a run goes on
            raise RuntimeError(f"the ranks did not agree on a save, one may have ended: {lost}") from (error or lost)
        for rank, answer in enumerate(answers):
            if answer["error"] is not None:
                kind, message = answer["error"]
                host = f" ({answer['host']})" if answer["host"] else ""
                raise KINDS.get(kind, RuntimeError)(f"rank {rank}{host}: {message}") from error
        return [answer["value"] for answer in answers]

    def first(self, work: Callable[[], T]) -> T:
        """Call ``work()`` on rank 0; return its result on every rank.  Fails on all ranks as :meth:`each` does."""
        return self.each(work if self.world.is_first else lambda: None)[0]


def _describe(error: Exception) -> tuple[str, str]:
    """Kind and message of an error, for other ranks."""
    kind = next((name for name, known in KINDS.items() if isinstance(error, known)), "")
    return kind, str(error) if kind else f"{type(error).__name__}: {error}"
