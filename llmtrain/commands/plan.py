"""``llmtrain plan``: what a run would be, without training it."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.commands import FINISHED, USAGE_ERROR, Invocation
from llmtrain.data import Corpus
from llmtrain.display import lines
from llmtrain.format import count
from llmtrain.lint import lint, overrides_of
from llmtrain.model import LanguageModel
from llmtrain.run import Run
from llmtrain.tokenizer import Tokenizer


@dataclass(frozen=True)
class Planned:
    """As much of a run's parts as a plan builds."""

    tokenizer: Tokenizer
    corpus: Corpus
    model: LanguageModel  # on the meta device
    max_steps: int
    device: torch.device | None = None
    optimizer: torch.optim.Optimizer | None = None


def main(run: Run, invocation: Invocation) -> int:
    """Print parameters, FLOPs per token, tokens, steps and what looks wrong; 2 if training would be refused."""
    tokenizer = run.tokenizer.build()
    corpus = run.data.build(tokenizer)
    with torch.device("meta"):  # sizes only: nothing is allocated
        model = run.model.build(run.vocab_size(tokenizer))
    run.lora.apply(model)
    sequence = run.data.sequence_length
    steps = run.loop.total_steps(run.accumulation, len(corpus.train), sequence)
    sequences = batch_sum(run, steps)
    tokens = sequences * sequence
    flops_per_token = model.flops_per_token(sequence)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()

    console = Console(highlight=False)
    parts = table("parameters")
    for part, number in model.parameters_by_part().items():
        parts.add_row(part, f"{number:,}", f"{number / total:.1%}")
    parts.add_row(Text("total", style="bold"), Text(f"{total:,}", style="bold"), "")
    if trainable < total:
        parts.add_row("trainable", f"{trainable:,}", f"{trainable / total:.1%}")
    console.print(parts)
    console.print()

    batch = run.accumulation.batch_size_at(0, 0)
    work = table("work")
    attention = flops_per_token - model.flops_per_token(0)
    work.add_row("data", "", Text(corpus.description))
    at_first = " at first" if sequences != batch * steps else ""
    work.add_row("tokens a step", f"{batch * sequence:,}", f"{batch} × {sequence}{at_first}")
    work.add_row("steps", f"{steps:,}", f"{run.schedule.warmup(steps):,} of them warm-up")
    epochs = tokens / max(corpus.train.tokens, 1)
    work.add_row("tokens", f"{tokens:,}", f"{epochs:.2f} epochs, {tokens / total:.2f} a parameter")
    formula = f"6 N: {count(model.flops_per_token(0))}, attention: {count(attention)}"
    work.add_row("FLOPs per token", f"{flops_per_token:,}", formula)
    work.add_row("FLOPs", f"{flops_per_token * tokens:.3e}", "")
    console.print(work)
    findings = lint(run, Planned(tokenizer, corpus, model, steps), overrides_of(invocation.command))
    if findings:
        console.print()
    for finding in findings:
        show = lines.error if finding.level == "error" else lines.warning
        console.print(show(finding.message), soft_wrap=True)
    return USAGE_ERROR if any(finding.level == "error" for finding in findings) else FINISHED


def table(title: str) -> Table:
    """A borderless table: name, number, remark."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    result.add_column()
    result.add_column(justify="right", overflow="fold")
    result.add_column(style="dim")
    return result


def batch_sum(run: Run, steps: int) -> int:
    """Sequences that ``steps`` steps take."""
    position = 0
    for step in range(steps):
        position += run.accumulation.batch_size_at(step, position * run.data.sequence_length)
    return position
