"""The messages of a run as rich text, for the plain display and for the lines above the live one."""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from llmtrain.base import format
from llmtrain.base.format import visible
from llmtrain.base.run_files import CHECKPOINTS
from llmtrain.display.progress import Progress
from llmtrain.metrics import Row

EXPECTED_EVENTS = ("save", "resume", "profile")  # others are highlighted
SELF_EXPLAINING = ("path", "message", "reason", "from")  # keys of an event whose values need no label
# Keys of an event that are not shown as they are: they are part of its reason, have lines of their own, or are long.
IN_OTHER_WORDS = {"event", "step", "examples", "changes", "rates", "removed", "loss", "grad_norm"}
EXIT_STYLES = {"finished": "bold green", "interrupted": "bold yellow"}


def header(rows: list[tuple[str, str]]) -> Text:
    """Format names and values in two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return Text("\n").join(
        Text.assemble((f"{visible(name):<{width}}  ", "dim"), visible(value).replace("\n", " ")) for name, value in rows
    )


def train(row: Row, progress: Progress) -> Text:
    """Format a train row; columns have the same width in every row."""
    parts = [_step(row["step"], progress), Text(f"loss {format.loss(row['loss']):>7}", style=loss_style(row["loss"]))]
    if row.get("learning_rate") is not None:
        parts.append(Text(f"lr {format.learning_rate(row['learning_rate'])}"))
    if row.get("grad_norm") is not None:
        parts.append(Text(f"grad norm {format.significant(row['grad_norm']):>8}", loss_style(row["grad_norm"])))
    if row.get("tokens_per_second") is not None:
        parts.append(Text(f"{format.count(row['tokens_per_second']):>5} tok/s"))
    if row.get("mfu") is not None:
        parts.append(Text(f"mfu {format.percent(row['mfu']):>5}"))
    if row.get("memory_bytes") is not None:
        parts.append(Text(f"{format.size(row['memory_bytes']):>7}"))
    if progress.remaining_seconds is not None:
        parts.append(Text(f"{format.duration(round(progress.remaining_seconds))} left"))
    return Text("  ").join(parts)


def validation(row: Row, progress: Progress) -> Text:
    """Format a validation loss, its perplexity, and its bits per byte."""
    value = row["val_loss"]
    line = Text.assemble(
        _step(row["step"], progress), "  ", ("validation", "bold cyan"), " loss ", (format.loss(value), "bold")
    )
    if "accuracy" in row:
        line.append(f"  accuracy {format.percent(row['accuracy'])}  macro-F1 {row['macro_f1']:.3f}")
    elif value < 20:  # the perplexity of a higher loss is meaningless
        line.append(f"  perplexity {format.significant(math.exp(value))}")
    if row.get("bits_per_byte") is not None:
        line.append(f"  {row['bits_per_byte']:.3f} bits per byte")
    if row.get("train_loss") is not None:
        line.append(f"  training loss {format.loss(row['train_loss'])}")
    return line


def sample_title(step: int, progress: Progress) -> Text:
    """Format the line above a sample."""
    return Text.assemble(_step(step, progress), "  ", ("sample", "bold magenta"))


def sample(prompt: str, text: str) -> Text:
    """Format the prompt, in bold, and the model's continuation."""
    shown = re.sub(r"\n(\s*\n){2,}", "\n\n", text)  # samples.jsonl has them all
    return Text.assemble((visible(prompt), "bold"), visible(shown))


def indented(text: Text) -> Text:
    margin = Text(" " * 4)
    return Text("\n").join(margin + line for line in text.split("\n", allow_blank=True))


def event(row: Row, progress: Progress) -> Text:
    """Format an event: its name and message, or its values; below them its worst example and a resume's changes."""
    name = row["event"]
    shown = ("message",) if "message" in row else row.keys() - IN_OTHER_WORDS
    details = "  ".join(
        f"{_label(key)}{format.quantity(key, value)}"
        for key, value in row.items()
        if key in shown and value not in (None, [])
    )
    style = "bold green" if name in EXPECTED_EVENTS else "bold yellow"
    title = visible(name.replace("_", " "))
    line = Text.assemble(_step(row["step"], progress), "  ", (title, style), "  " if details else "", details)
    worst = (row.get("examples") or [])[:1]  # the others are in the metrics
    below = [*map(_example, worst), *_changes(row)]
    return Text("\n").join([line, *map(indented, below)])


def _example(example: dict[str, Any]) -> Text:
    text = visible(example["text"]).replace("\n", " ")
    return Text.assemble(f"sequence {example['sequence']:,}, loss {format.loss(example['loss'])}: ", (text, "italic"))


def _changes(row: Row) -> Iterator[Text]:
    """Yield the changed settings of a resumed run as a table, and the change of its learning rate."""
    table = [("key", "stored", "now")] if row.get("changes") else []
    table += [(key, format.setting(stored), format.setting(now)) for key, stored, now in row.get("changes") or []]
    widths = [max((len(cells[column]) for cells in table), default=0) for column in (0, 1)]
    for number, (key, stored, now) in enumerate(table):
        yield Text(f"{visible(key):<{widths[0]}}  {stored:<{widths[1]}}  {now}", style="" if number else "bold")
    if rates := row.get("rates"):
        yield Text(f"learning rate at step {row['step'] + 1:,}: {rates[0]:.2e} -> {rates[1]:.2e}")


def warning(text: str) -> Text:
    return Text.assemble(("warning: ", "bold yellow"), (visible(text), "yellow"))


def error(text: str) -> Text:
    """Format an error for which training would be refused."""
    return Text.assemble(("error: ", "bold red"), (visible(text), "red"))


def summary(summary: Row, run_dir: Path) -> Text:
    """Format the end of a run: its reason, results and directory, and the commands that may follow."""
    reason = str(summary["exit_reason"])
    parts = [
        Text.assemble(
            (visible(reason), EXIT_STYLES.get(reason, "bold red")),
            f" at step {summary['step']:,} of {summary['max_steps']:,}",
        ),
        *(Text.assemble((f"  {name:<16} ", "dim"), value) for name, value in _results(summary, run_dir)),
        Text.assemble(("  run directory    ", "dim"), visible(str(run_dir))),
        Text("next", style="bold"),
    ]
    target = visible(shlex.quote(str(run_dir)))
    if reason != "finished":
        parts.append(Text(f"  llmtrain resume {target}"))
    verb = str(summary.get("verb", "generate"))
    verbs = [verb, "report", *["export"] * (reason == "finished")]
    parts += [Text(f"  {format.command(each, target)}") for each in verbs]
    return Text("\n").join(parts)


def _results(summary: Row, run_dir: Path) -> list[tuple[str, str]]:
    results = []
    if summary.get("final_loss") is not None:
        results.append(("train loss", format.loss(summary["final_loss"])))
    if summary.get("final_train_loss") is not None:
        results.append(("train, evaluated", format.loss(summary["final_train_loss"])))
    if summary.get("final_val_loss") is not None:
        value = format.loss(summary["final_val_loss"])
        if summary.get("best_val_loss") is not None and summary.get("accuracy") is None:
            value += _best(summary, format.loss(summary["best_val_loss"]), run_dir)
        results.append(("validation loss", value))
    if summary.get("bits_per_byte") is not None:
        results.append(("bits per byte", f"{summary['bits_per_byte']:.3f}, of the validation text"))
    if summary.get("accuracy") is not None:
        value = f"{format.percent(summary['accuracy'])}, macro-F1 {summary['macro_f1']:.3f}"
        if summary.get("best_accuracy") is not None:
            value += _best(summary, format.percent(summary["best_accuracy"]), run_dir)
        results.append(("accuracy", value))
    if summary.get("tokens") is not None:
        results.append(("tokens", format.count(summary["tokens"])))
    if summary.get("train_seconds") is not None:
        results.append(("time", format.duration(summary["train_seconds"])))
    if summary.get("time_shares"):
        shares = [f"{phase} {format.percent(share)}" for phase, share in summary["time_shares"].items()]
        results.append(("time by phase", ", ".join(shares)))
    if summary.get("tokens_per_second") is not None:
        results.append(("throughput", f"{format.count(summary['tokens_per_second'])} tok/s"))
    if summary.get("refused_steps"):
        results.append(("refused steps", f"{summary['refused_steps']:,} (not finite, or far from the usual)"))
    if summary.get("skipped_sequences"):
        results.append(("skipped", f"{summary['skipped_sequences']:,} sequences of the data, by the recovery"))
    if summary.get("profile"):
        results.append(("profile", visible(summary["profile"])))
    return results


def _best(summary: Row, value: str, run_dir: Path) -> str:
    """Format the best result, its step, and whether that step has a checkpoint."""
    best = summary.get("best_val_step")
    if best is None:
        return ""
    if not best:
        note = ", before training"
    elif best == summary["step"]:
        note = ""
    elif (run_dir / CHECKPOINTS / f"step-{best:08d}").is_dir():
        note = ", kept" if summary.get("keeps_best", True) else ", still there; checkpoint.keep_best=1 keeps it"
    elif summary.get("keep_best"):
        note = ", which has no checkpoint"
    else:
        note = ", not kept: checkpoint.keep_best=1 keeps it"
    return f" (best {value} at step {best:,}{note})"


def loss_style(value: float) -> str:
    """Return red for a value that is not finite."""
    return "" if math.isfinite(value) else "bold red"


def _step(step: int, progress: Progress) -> Text:
    return Text(f"step {progress.label(step)}", style="dim")


def _label(key: str) -> str:
    """Format a key in words, without ``bytes`` and ``seconds``, which its value shows."""
    if key in SELF_EXPLAINING:
        return ""
    if key == "held_seconds":
        return "training waited "
    words = [word for word in key.split("_") if word not in ("bytes", "seconds")]
    return visible(" ".join([*words, ""]))
