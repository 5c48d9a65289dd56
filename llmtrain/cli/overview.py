"""The text of ``llmtrain --help``."""

from llmtrain import __version__
from llmtrain.cli.arguments import VERBS

OVERVIEW = """llmtrain {version}: config-driven training of language models

  llmtrain VERB [TARGET] [group=option] [key=value] [flags]

{verbs}

Examples
  llmtrain train experiment=laptop
  llmtrain train model=gpt124m data=text data.path=my-text loop.max_steps=5000
  llmtrain train -m experiment=laptop optimizer.lr=2.5e-3,5e-3,1e-2
  llmtrain resume runs/2026-11-21/gpt124m-k3v9
  llmtrain verify runs/2026-11-21/gpt124m-k3v9
  llmtrain generate runs/2026-11-21/gpt124m-k3v9 prompt="Once upon a time"
  llmtrain export runs/2026-11-21/gpt124m-k3v9 to=my-model

Flags
  -m, --multirun     run a sweep: every combination of comma-separated values, each in a process of its own
  --cfg job          show the composed config and do nothing
  --info             show the sources of the config
  --from RUN_DIR     train: begin with the settings of an earlier run, or of a sweep's best job
  --config-dir DIR   add a folder of your own with config groups, as in DIR/model/mine.yaml
  --debug            show the traceback of an error
  llmtrain VERB --help lists a verb's groups with their options, and every key with its value and meaning.

Exit status: 0 finished, 1 failed, 2 the command or its config is wrong, 75 stopped after saving (resume continues).

Shell completion: eval "$(llmtrain -sc install=bash)"   (or zsh, fish)
"""


def overview() -> str:
    return OVERVIEW.format(version=__version__, verbs="\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items()))
