"""Hydra's own command line, run on ours put in its order."""

import sys
import tempfile
from typing import Any

from llmtrain.cli.arguments import UsageError


def run_hydra(verb: str, flags: list[str], overrides: list[str], task: Any) -> None:
    """Run Hydra's own command line on ours, put in its order."""
    import hydra

    from llmtrain.config.compose import VERSION_BASE
    from llmtrain.config.folders import conf_dir

    with tempfile.TemporaryDirectory() as scratch:  # for what Hydra writes of a sweep, secrets included
        ours = [
            "hydra.run.dir=.", "hydra.output_subdir=null", f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=.",
            "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=llmtrain",
        ]  # fmt: skip
        before, sys.argv = sys.argv, ["llmtrain", *flags, *ours, *overrides]
        try:
            hydra.main(config_path=str(conf_dir()), config_name=verb, **VERSION_BASE)(task)()
        except SystemExit as error:  # after --help, or argparse has shown what is wrong with a flag's value
            if error.code:
                raise UsageError("see llmtrain --help") from error
        finally:
            sys.argv = before
