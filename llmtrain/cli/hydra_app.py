"""Hydra's own command line, called with our arguments in the order that it expects."""

import sys
import tempfile
from typing import Any

from llmtrain.cli.arguments import UsageError


def run_hydra(verb: str, flags: list[str], overrides: list[str], task: Any) -> None:
    """Let Hydra compose ``conf/<verb>.yaml`` with ``overrides`` and call ``task`` with each config."""
    import hydra

    from llmtrain.config.compose import VERSION_BASE
    from llmtrain.config.folders import conf_dir

    with tempfile.TemporaryDirectory() as scratch:  # Hydra writes files of a sweep, secrets included
        ours = [
            "hydra.run.dir=.", "hydra.output_subdir=null", f"hydra.sweep.dir='{scratch}'", "hydra.sweep.subdir=.",
            "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=llmtrain",
        ]  # fmt: skip
        before, sys.argv = sys.argv, ["llmtrain", *flags, *ours, *overrides]
        try:
            hydra.main(config_path=str(conf_dir()), config_name=verb, **VERSION_BASE)(task)()
        except SystemExit as error:  # after --help, or after argparse has shown an error in a flag's value
            if error.code:
                raise UsageError("see llmtrain --help") from error
        finally:
            sys.argv = before
