"""Our loop, put together as a run does, for what has to be measured from within a run."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain import Run
    from llmtrain.config.run_config import Parts
    from llmtrain.train.loop import Loop


@contextlib.contextmanager
def open_loop(run: "Run", parts: "Parts", folder: Path) -> Iterator["Loop"]:
    """The loop of ``run`` over its assembled ``parts``, at step 0, writing into ``folder``."""
    from llmtrain.checkpoint.writer import Saver
    from llmtrain.display import PlainDisplay
    from llmtrain.run.directory import RunDirectory
    from llmtrain.run.session import make_loop
    from llmtrain.train.state import TrainState

    folder.mkdir()
    directory = RunDirectory(folder)
    directory.config.write_text("name: benchmark\n")
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.precision.arithmetic())
        loop = make_loop(
            run, parts, directory, TrainState(data=parts.corpus.fingerprint),
            metrics=stack.enter_context(run.metrics.build(folder, resume_step=None)),
            display=PlainDisplay(folder, io.StringIO()),
            saver=stack.enter_context(Saver(run.checkpoint, directory, parts.device)),
            peak_flops=1.0, stop=lambda: None,
        )  # fmt: skip
        stack.enter_context(contextlib.closing(loop))
        loop.model.train()
        yield loop
