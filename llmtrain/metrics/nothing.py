"""The metrics of the ranks that write none."""

from llmtrain.metrics import Metrics, Row


class NoMetrics(Metrics):
    """A sink that keeps nothing: rank 0 writes the rows."""

    def row(self, row: Row) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass
