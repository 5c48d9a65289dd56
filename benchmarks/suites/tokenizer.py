"""Tokenisers alone."""

from dataclasses import replace

from benchmarks.measurement import Measurement
from benchmarks.suites import OURS, Column, Setup, Suite, figure, gigabytes
from benchmarks.workers.encoders import MAKERS


def plan(setup: Setup) -> list[list[Measurement]]:
    """One group."""
    task = setup.task
    python = setup.settings.python_of("hf_trainer")  # transformers makes the tokenizer
    measurements = [
        setup.ours("tokenizer", "gpt2", replace(task, contestant=name), name, worker="encoders") for name in MAKERS
    ]
    return [[replace(each, python=python) if "tokenizers" in each.contestant else each for each in measurements]]


SUITE = Suite(
    "tokenizer", "Tokenisers alone",
    "The same text to GPT-2's ids on all cores, each document followed by its end-of-text id. Ours is the whole of "
    "preparing a data set, the others encode only.",
    plan, (
        Column("MB/s", figure("bytes_per_second"), lambda rate: f"{rate / 1e6:.1f}"),
        Column("ids", figure("tokens"), lambda count: f"{count:,.0f}"),
        Column("peak memory, GB", figure("memory_bytes"), gigabytes),
    ), reference=OURS, comparison="ours is faster by",
)  # fmt: skip
