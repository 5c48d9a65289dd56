"""Suggestions for unknown keys, options and flags: the closest match, or the valid names."""

import difflib
import re
from collections.abc import Sequence
from shlex import quote
from typing import Any

from llmtrain.base.checks import did_you_mean

# Names that other programs give to settings, and ours.
PEERS = {
    "learning_rate": "optimizer.lr", "max_lr": "optimizer.lr", "wd": "optimizer.weight_decay",
    "num_epochs": "loop.epochs", "num_train_epochs": "loop.epochs", "max_epochs": "loop.epochs",
    "steps": "loop.max_steps", "num_steps": "loop.max_steps", "max_iters": "loop.max_steps", "iters": "loop.max_steps",
    "train_steps": "loop.max_steps", "max_train_steps": "loop.max_steps", "tokens": "loop.max_tokens",
    "num_tokens": "loop.max_tokens", "train_tokens": "loop.max_tokens", "bs": "accumulation.batch_size",
    "train_batch_size": "accumulation.batch_size", "global_batch_size": "accumulation.batch_size",
    "per_device_train_batch_size": "accumulation.micro_batch_size",
    "seq_len": "data.sequence_length", "seq_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length", "max_length": "data.sequence_length", "dataset": "data.path",
    "train_file": "data.path", "data_dir": "data.path", "n_layer": "model.num_layers", "n_layers": "model.num_layers",
    "n_head": "model.num_heads", "n_heads": "model.num_heads", "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size", "grad_clip": "clipping.max_norm", "max_grad_norm": "clipping.max_norm",
    "eval_interval": "loop.eval_every", "eval_steps": "loop.eval_every", "log_interval": "metrics.log_every",
    "logging_steps": "metrics.log_every", "save_steps": "checkpoint.every_steps", "lora_r": "lora.rank",
    "save_interval": "checkpoint.every_steps", "lora_alpha": "lora.alpha", "out_dir": "output_dir",
    "model_name_or_path": "weights.path", "init_from": "weights", "dtype": "precision", "mixed_precision": "precision",
    "optim": "optimizer", "lr_scheduler_type": "schedule", "scheduler": "schedule", "gradient_checkpointing":
    "activation_checkpointing", "resume_from_checkpoint": "weights.path", "run_name": "name",
}  # fmt: skip

RECIPE = "a recipe of yours lies in a folder: --config-dir DIR experiment=NAME reads DIR/experiment/NAME.yaml"
_BATCH = (
    "accumulation.batch_size is the number of sequences of an optimizer step, accumulation.micro_batch_size how many "
    "of them go through at once"
)
# Names of other programs that no key of ours has the same values as: what to say instead.
REMEDIES = {
    "gradient_accumulation_steps": _BATCH, "gradient_accumulation": _BATCH, "accumulation_steps": _BATCH,
    "grad_accum_steps": _BATCH, "grad_accum": _BATCH,
    "block_size": "data.sequence_length={value} for the sequences that are trained on; model.context_length={value} "
    "for the longest that the model reads",
    "wandb": "metrics=tensorboard writes curves beside metrics.jsonl; nothing is sent to Weights & Biases",
    "config": RECIPE, "config_file": RECIPE, "config_path": RECIPE, "config_name": RECIPE,
}  # fmt: skip
NO = ("false", "no", "off", "0", "null", "none")
TRAINING = ("train", "resume", "plan")  # verbs whose configs have the groups of a run


def remedy(word: str, value: str) -> str:
    """Return what to say of a word that is no key of a run's config, but known from other programs, or an option."""
    if word in REMEDIES:
        return f"; {REMEDIES[word].format(value=value or '…')}"
    named = options_named(word)
    if not named:
        return ""
    if value.lower() not in NO:
        return f"; did you mean {' or '.join(named)}?"
    groups = " and ".join(option.partition("=")[0] for option in named)
    return f"; it is an option of {groups}: choose another, as in {option_beside(named[0])}"


def option_beside(choice: str) -> str:
    """Return another option of the group than that of ``group=option``, the default one if there is one."""
    from llmtrain.config.folders import conf_dir

    group, _, option = choice.partition("=")
    names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml") if path.stem != option)
    return f"{group}={next((name for name in ('none', 'auto') if name in names), ' or '.join(names[:1]))}"


def keys_named(verb: str, word: str) -> list[str]:
    """List the keys and groups of a verb that a word names: in full, by its last part, or as another program does."""
    from llmtrain.config.compose import compose

    if not re.fullmatch(r"[A-Za-z_][\w.]*", word):
        return []
    keys = flatten(compose("train" if verb == "resume" else verb, ["to=x"] * (verb == "export")))
    if word in keys:
        return [word]
    same = [key for key in keys if key.rsplit(".", 1)[-1] == word]
    return same or [key for key in (PEERS.get(word),) if key in keys]


def options_named(word: str) -> list[str]:
    """List the options of all groups of this name, as ``group=option``."""
    from llmtrain.config.folders import conf_dir

    return sorted(f"{path.parent.name}={word}" for path in conf_dir().glob("*/*.yaml") if path.stem == word)


def flag_hint(verb: str, name: str, value: str, flags: Sequence[str]) -> str:
    """Suggest, for an unknown flag, the key of the same name without dashes, else the closest flag."""
    word = name.lstrip("-").replace("-", "_")
    if word in REMEDIES and verb in TRAINING:
        return remedy(word, value)
    same = keys_named(verb, word) if len(word) > 1 else []
    if not same and (options := options_named(word)):
        return f"; settings have no dashes: {' or '.join(options)}"
    if not same:
        return names_hint(name, flags)
    is_value = value and "=" not in value and not value.startswith("-")
    return (
        f"; settings have no dashes: {' or '.join(quote(f'{key}={value}') if is_value else f'{key}=…' for key in same)}"
    )


def key_hint(key: str, verb: str, value: str = "") -> str:
    """Suggest, for an unknown key, the closest key of the verb's config in any group, else the keys beside it."""
    from llmtrain.config.compose import compose

    known = flatten(compose("train" if verb == "resume" else verb, ["to=x"] * (verb == "export")))
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    if "." not in key and not same_name and verb in TRAINING and (hint := remedy(key, value)):
        return hint
    siblings = [name for name in known if name.rsplit(".", 1)[0] == key.rsplit(".", 1)[0]] if "." in key else []
    longer = [name for name in siblings if name.rsplit(".", 1)[-1].startswith(f"{last}_")]
    best = same_name or difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, known, n=1)
    group, _, name = key.partition(".")
    if name and group in known and same_name in ([], [key]) and (options := options_with(group, name)):
        return f"; the chosen option of {group} has none, others have: {' or '.join(f'{group}={o}' for o in options)}"
    if longer and not same_name:
        return f"; did you mean {' or '.join(longer)}?"
    peers = same_name if "." not in key else []
    if "." not in key and not same_name and PEERS.get(key) in known:
        peers = [PEERS[key]]
    if peers and value:
        return f"; did you mean {' or '.join(f'{name}={value}' for name in peers)}?"
    if best == [key]:
        return f"; the chosen option of {group} has none (its keys: --cfg job --package {group})"
    if best:
        return f"; did you mean {best[0]}?"
    groups = sorted({name.split(".")[0] for name in known})
    return f"; there are: {', '.join(siblings or groups)}"


def options_with(group: str, name: str) -> list[str]:
    """List the options of ``group`` that have a key ``name``."""
    from llmtrain.config.folders import conf_dir

    files = sorted((conf_dir() / group).glob("*.yaml")) if group.isidentifier() else []
    return [file.stem for file in files if re.search(rf"(?m)^{re.escape(name)}:", file.read_text(encoding="utf-8"))]


def flatten(values: dict[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys of a nested config, groups included."""
    keys = []
    for key, value in values.items():
        if key != "_target_":
            keys.append(prefix + key)
            keys += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


def names_hint(name: str, known: Sequence[str]) -> str:
    """Suggest the closest name and list all: "; did you mean adamw? there are: …"."""
    return f"{did_you_mean(name, known, cutoff=0.6) or ';'} there are: {', '.join(known)}"
