"""A stored run, as a resume, a branch or a new run with its settings reads it."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.base.run_files import CONFIG, TOKENIZER
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.config import stored_config
from llmtrain.config.older_versions import complete
from llmtrain.config.run_config import RunConfig
from llmtrain.data.shards import Shards
from llmtrain.distributed.remote_rank import SSH
from llmtrain.run.changes import MOVABLE, changes, refuse_change
from llmtrain.run.directory import RunDirectory
from llmtrain.run.places import READ, find_places
from llmtrain.run.tokenizer_copy import stored_tokenizer
from llmtrain.tokenizer import TokenizerConfig

OUTPUT_DIR = "runs"  # as in conf/train.yaml


class StoredRun:
    """A stored run: its directory, and the config for a resume from ``step`` (None: the newest checkpoint).

    The config is read and completed once.  Raises ValueError for a directory that is no run, and for a
    damaged config.
    """

    def __init__(self, run_dir: Path, step: int | None = None) -> None:
        self.directory = RunDirectory.open(run_dir)
        self.step = step
        self.config_path = self.directory.config_at(step)
        if self.config_path != self.directory.config:
            verify_checkpoint(self.config_path.parent, only=self.config_path.name)
        self.written = stored_config.load(self.config_path)
        self.raw = find_places(self.written, run_dir)

    @cached_property
    def completed(self) -> dict[str, Any]:
        """The config, with today's defaults for keys that an older version did not write.

        It may name classes of a plugin; the user names the plugin again at a resume.
        """
        return complete(stored_config.untrusted(self.raw))

    def composable(self) -> dict[str, Any]:
        """The config to compose a resume from.

        Without the run's directory, which may have been moved; a branch is made where the run lies now.  Without the
        machines that it was started on, and the command that reached them: a directory from elsewhere starts nothing.
        """
        distributed = {**self.completed["distributed"], "hostfile": None, "ssh": SSH}
        return self.completed | {"run_dir": None, "output_dir": self.output_dir, "distributed": distributed}

    @property
    def output_dir(self) -> str:
        """The folder that a branch is made in: that of the run's date, or the default.

        Not the stored one, since a config from elsewhere does not decide where anything is written.
        """
        day = self.directory.path.absolute().parent
        return str(day.parent) if re.fullmatch(r"\d{4}-\d\d-\d\d", day.name) else OUTPUT_DIR

    def completed_at(self, checkpoint: Path) -> Mapping[str, Any]:
        """The completed config of ``checkpoint``: older than the run's if a resume was killed before it saved."""
        config = stored_config.load(checkpoint / CONFIG)
        if config == stored_config.load(self.config_path):
            return self.completed
        return complete(stored_config.untrusted(find_places(config, self.directory.path)))

    def tokenizer(self, run: RunConfig) -> TokenizerConfig:
        """The tokenizer of ``run``, a resume with its changes: the run's own copy, or one that the user names.

        Raises ValueError where that is another one, or the copy is damaged.
        """
        changed = [key for key, _, _ in changes(self.completed, run) if key in ("tokenizer.path", "tokenizer.encoding")]
        return stored_tokenizer(run.tokenizer, self.directory.path, named=bool(changed))

    def as_written(self, run: RunConfig) -> dict[str, Any]:
        """The options of ``run`` whose files were found elsewhere than the config says, with the places that it says.

        So that a run which moves again is looked for as before.
        """
        options: dict[str, Any] = {}
        for group, keys in READ.items():
            for key in keys:
                written, found = ((config.get(group) or {}).get(key) for config in (self.written, self.raw))
                option = options.get(group, getattr(run, group))
                if written != found and getattr(option, key, None) == found:
                    options[group] = replace(option, **{key: written})
        return options

    def check_places(self, run: RunConfig) -> None:
        """Raise ValueError if the user has named another tokenizer, or weights, than those that the run started with.

        Those of adapters are compared later, with the fingerprint in the checkpoint.
        """
        moved = {key: (old, new) for key, old, new in changes(self.completed, run) if key in MOVABLE}
        self.tokenizer(run)
        has_copy = os.path.lexists(self.directory.path / TOKENIZER)
        for key in ("tokenizer.path", "tokenizer.encoding"):  # without a copy the data's fingerprint has to tell
            if key in moved and not has_copy and isinstance(run.data, Shards):
                refuse_change(key, *moved[key])
        if "weights.path" in moved and not run.lora.adapts:
            recorded = (self.directory.read_environment() or {}).get("weights")
            if not recorded or run.weights.fingerprint() != recorded:
                refuse_change("weights.path", *moved["weights.path"])
