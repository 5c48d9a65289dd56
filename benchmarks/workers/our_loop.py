"""Our loop, put together as a run does, for what has to be measured from within a run."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain import Run
    from llmtrain.loop import Loop
    from llmtrain.run_config import Parts


@contextlib.contextmanager
def open_loop(run: "Run", parts: "Parts", folder: Path) -> Iterator["Loop"]:
    """The loop of ``run`` over its assembled ``parts``, at step 0, writing into ``folder``."""
    from llmtrain.display import PlainDisplay
    from llmtrain.run_directory import RunDirectory
    from llmtrain.saver import Saver
    from llmtrain.state import TrainState
    from llmtrain.training import make_loop

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
