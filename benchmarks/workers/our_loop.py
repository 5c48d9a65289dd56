"""Our loop, put together as a run does, for what has to be measured from within a run."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain import Run
    from llmtrain.config.assemble import Parts
    from llmtrain.train.loop import Loop


@contextlib.contextmanager
def open_loop(run: "Run", parts: "Parts", folder: Path) -> Iterator["Loop"]:
    """The loop of ``run`` over its assembled ``parts``, compiled as in a run, at step 0, writing into ``folder``."""
    from llmtrain.config import stored_config
    from llmtrain.config.assemble import first_state
    from llmtrain.display import PlainDisplay
    from llmtrain.run.directory import RunDirectory
    from llmtrain.run.session import make_log, make_loop, make_saver, make_step, tune
    from llmtrain.train.profiler import Profiler

    folder.mkdir()
    directory = RunDirectory(folder)
    directory.config.write_text(stored_config.dump(run))
    state = first_state(run, parts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.precision.arithmetic())
        metrics = stack.enter_context(run.metrics.build(folder, resume_step=None))
        log = make_log(
            run, parts, directory, metrics, PlainDisplay(folder, io.StringIO()), peak_flops=1.0,
            log_every=run.metrics.log_every, profiler=Profiler(),
        )  # fmt: skip
        step = make_step(run, parts, state, log)
        tune(run, parts, step, state, peak_flops=1.0)
        saver = stack.enter_context(make_saver(run, directory, parts))
        loop = make_loop(run, parts, directory, state, step, log, saver, stop=lambda: None)
        stack.enter_context(contextlib.closing(loop))
        parts.unit.train()
        yield loop
