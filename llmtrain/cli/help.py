"""``llmtrain VERB --help``: groups and keys of a verb, from its YAML and the comments beside the keys.

The comments are the only description of a key, so that help and config cannot differ.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrain.base.format import visible, width
from llmtrain.config.compose import folders, options

# A key, at the top or one level below it, its value and the comment behind it.
COMMENTED = re.compile(r"(?P<below>  )?(?P<key>\w+):.*?(?:\s#\s*(?P<comment>.*))?")
RESUME = "resume"  # its config is the run's own
ON_RESUME = [
    "Continue a run exactly where it stopped: llmtrain resume runs/2026-11-21/gpt124m-k3v9",
    "A key that is given is a recorded change, as in loop.max_steps=4000 schedule=constant.  Changes that would make",
    "it another run are refused: name, model, tokenizer, data (not its path), objective, weights, lora, runtime.seed.",
    "step=800, or run_dir=DIR, starts a branch in a run directory of its own.",
]


def show(verb: str, usage: str, composed: Mapping[str, Any], choices: Mapping[str, Any], named: Sequence[str]) -> None:
    """Print usage, groups and keys of the verb, with the overrides that were given beside ``--help`` applied.

    If ``named`` has groups, whose options the user chose, only these are printed.
    """
    print_parts(parts(verb, usage, composed, choices, named))


def show_resume(usage: str) -> None:
    """Print the help of ``resume`` where no run is named, whose stored config would have the keys."""
    print_parts([
        Text(usage, style="bold"),
        *(Text(f"  {line}", style="dim") for line in ON_RESUME),
        Text("\nthe settings of a run: llmtrain resume RUN_DIR --help"),
    ])  # fmt: skip


def print_parts(shown: Iterable[RenderableType]) -> None:
    """Print the parts of a help in the width of the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width()
    with console.capture() as capture:
        for part in shown:
            console.print(part, soft_wrap=isinstance(part, Text))  # text that is copied stays in one line
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def parts(
    verb: str, usage: str, composed: Mapping[str, Any], choices: Mapping[str, Any], named: Sequence[str]
) -> Iterator[RenderableType]:
    """Yield the parts of the help, from top to bottom."""
    searched = folders()
    groups = [str(name) for name in composed if name in choices and isinstance(composed[name], Mapping)]
    recipe = choices.get("experiment")
    yield Text(usage, style="bold")
    if (chosen := [group for group in groups if group in named]) and not recipe and verb != RESUME:
        for group in chosen:
            yield from option_help(searched, group, choices[group], composed[group])
        yield Text(f"\nall groups and keys: llmtrain {verb} --help")
        return
    head = ON_RESUME if verb == RESUME else leading_comment(searched, f"experiment/{recipe}" if recipe else verb)
    for line in head:
        yield Text(visible(f"  {line}"), style="dim")
    if groups and verb != RESUME:
        yield groups_table({**{group: choices[group] for group in groups}, "experiment": recipe})
    plain = settings({key: value for key, value in composed.items() if key not in groups})
    comments = {**(commented(searched, "train") if groups else {}), **commented(searched, verb)}
    yield keys_table("settings", "", plain, comments)
    for group in groups:
        values = settings(composed[group])
        title = group if verb == RESUME else f"{group}={choices[group]}"
        if values:
            yield keys_table(title, f"{group}.", values, comments_of(searched, group, choices[group], composed[group]))
    if groups:
        yield Text(f"\nan option and its keys: llmtrain {verb} group=option --help")
    yield Text("--cfg job shows the composed config as YAML, --hydra-help Hydra's own flags")


def option_help(folders: Sequence[Path], group: str, option: str, node: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"\n{group}={option}", style="bold cyan")
    for line in leading_comment(folders, f"{group}/{option}"):
        yield Text(visible(f"  {line}"), style="dim")
    values = settings(node)
    if values:
        yield keys_table("", f"{group}.", values, comments_of(folders, group, option, node))


def settings(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that can be set; those of a node with a class of its own as ``node.key``."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and "_target_" in value:
            found |= {f"{key}.{name}": below for name, below in settings(value).items()}
        elif key != "_target_":
            found[str(key)] = value
    return found


def groups_table(chosen: Mapping[str, Any]) -> Table:
    """Build the table of each group's options, the chosen one first."""
    table = titled("groups")
    for group, option in chosen.items():
        others = [name for name in options(group) if name != option]
        first = Text(visible(str(option)), style="bold") if option else Text("none", style="bold")
        table.add_row(f"  {group}", Text.assemble(first, "  ", visible(" ".join(others))))
    return table


def keys_table(title: str, prefix: str, values: Mapping[str, Any], comments: Mapping[str, str]) -> Table:
    table = titled(title)
    for key, value in values.items():
        setting = Text.assemble(f"  {prefix}{key}", ("=", "dim"), (written(value), "bold"))
        table.add_row(setting, Text(visible(comments.get(key, ""))))
    return table


def titled(title: str) -> Table:
    """Build an empty table of two columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    if title:
        table.title, table.title_justify, table.title_style = f"\n{title}", "left", "bold cyan"
    table.add_column(overflow="fold", max_width=56)
    table.add_column(overflow="fold")
    return table


def written(value: Any) -> str:
    """Format a value as it is written on a command line."""
    if isinstance(value, str) and not value.isprintable():
        return repr(value)[1:-1].join('""')
    if isinstance(value, float):
        return repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).strip()
    return visible(text.removesuffix("\n...").strip() if text != "''" else '""')


# --- comments ------------------------------------------------------------------------------------------------------


def comments_of(folders: Sequence[Path], group: str, option: str, node: Mapping[str, Any]) -> dict[str, str]:
    """Collect the comments on the keys of an option, from its file or another one of the same class."""
    found = commented(folders, f"{group}/{option}")
    target = str(node.get("_target_"))
    for folder in folders:
        for path in sorted((folder / group).glob("*.yaml")):
            if any(key not in found for key in node) and f"_target_: {target}" in path.read_text(encoding="utf-8"):
                found = {**commented(folders, f"{group}/{path.stem}"), **found}
    return found


def commented(folders: Sequence[Path], name: str) -> dict[str, str]:
    """Collect the comment behind each key of a file, with its continuation on the lines below.

    A key one level below another is named with it, as in ``weights.path``.
    """
    found: dict[str, str] = {}
    key = None
    node = ""
    for line in read(folders, name):
        if match := COMMENTED.fullmatch(line):
            node = node if match["below"] else match["key"]
            key = (f"{node}.{match['key']}" if match["below"] else node) if match["comment"] else None
            found |= {key: match["comment"]} if key else {}
        elif key and (more := re.match(r"\s+#\s*(.*)", line)):
            found[key] += f" {more[1]}"
        else:
            key = None
    return found


def leading_comment(folders: Sequence[Path], name: str) -> list[str]:
    """Return the comment at the beginning of a file, as lines."""
    lines = []
    for line in read(folders, name):
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def read(folders: Sequence[Path], name: str) -> list[str]:
    """Read the lines of the first file of this name; none if there is no such file."""
    files = (folder / f"{name}.yaml" for folder in folders)
    path = next((path for path in files if path.is_file()), None)
    return [] if path is None else path.read_text(encoding="utf-8").splitlines()
