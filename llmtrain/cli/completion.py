"""Shell completion of verbs, groups and keys."""

import os
import re
from collections.abc import Sequence

from llmtrain.cli.arguments import VERBS, UsageError
from llmtrain.cli.hydra_app import run_hydra


def complete(arguments: Sequence[str]) -> int:
    """Complete the verb, and leave the rest to Hydra: ``-sc install=bash``, ``-sc query=bash``."""
    line = os.environ.get("COMP_LINE", "")
    request = arguments[1] if len(arguments) == 2 else ""
    if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", request):
        raise UsageError('-sc: as in: eval "$(llmtrain -sc install=bash)"   (or uninstall; bash, zsh or fish)')
    words = line.split()
    verb = "train"
    if request.startswith("query="):
        typed_verb = len(words) > 2 or (len(words) == 2 and line.endswith(" "))
        if not typed_verb:
            print(" ".join(name for name in VERBS if name.startswith(words[1] if len(words) == 2 else "")))
            return 0
        verb = words[1]
        if verb not in VERBS or (verb in ("generate", "export", "report") and not words[-1]):
            return 0
        os.environ["COMP_LINE"] = line.replace(f" {verb}", "", 1)  # Hydra knows no verbs
    run_hydra("train" if verb == "resume" else verb, ["-sc"], [request], lambda _: None)
    return 0
