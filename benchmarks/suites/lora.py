"""What LoRA saves: beside training all weights, and beside PEFT."""

from dataclasses import replace

from benchmarks.measurement import Measurement
from benchmarks.suites import Column, Setup, Suite, figure, gigabytes
from benchmarks.suites.training import group_name
from benchmarks.workers.gpt2_base import base_path

OURS, OURS_BF16, OURS_FULL = "llmtrain, LoRA", "llmtrain, LoRA, base in bf16", "llmtrain, all weights"
PEFT, TRAINER = "PEFT + HF Trainer, LoRA", "HF Trainer, all weights"
RANK, ALPHA = 16, 16

LORA = ("lora=lora", f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.dropout=0.0", "lora.targets=[all-linear]")


def plan(setup: Setup) -> list[list[Measurement]]:
    """A group for each mode and batch size; the peers' measurements where the Trainer is among them."""
    settings = setup.settings
    variants = {OURS: LORA, OURS_BF16: (*LORA, "lora.quantization=bf16"), OURS_FULL: ("lora=none",)}
    groups = []
    for mode in settings.modes:
        for batch_size in settings.batch_sizes:
            task = setup.task_for(mode, batch_size=batch_size)
            weights = ("weights=huggingface", f"weights.path='{base_path(task)}'")
            name = group_name(mode, batch_size, settings.batch_sizes)
            group = [
                setup.ours(
                    "lora", name, replace(task, overrides=(*task.overrides, *weights, *more)), contestant,
                    worker="our_fine_tuning",
                )
                for contestant, more in variants.items()
            ]  # fmt: skip
            if "hf_trainer" in settings.peers:
                group += [
                    Measurement(
                        "lora", name, contestant, "hf_fine_tuning", replace(task, contestant=contestant),
                        settings.python_of("hf_trainer"), setup.environment(),
                    )
                    for contestant in (PEFT, TRAINER)
                ]  # fmt: skip
            groups.append(group)
    return groups


SUITE = Suite(
    "lora", "LoRA",
    "Fine-tuning of the same GPT-2, whose weights are random and come from a checkpoint of transformers' with the "
    f"vocabulary as published: all weights, and adapters of rank {RANK}, alpha {ALPHA}, without dropout, on every "
    "linear layer of the blocks. Token file, AdamW, clipping, threads and timing are as in the training suite. Memory "
    "is read before the checkpoint at the end is written; the checkpoint is all that is needed to go on: weights or "
    "adapters, optimizer, counters.",
    plan, (
        Column("tok/s", figure("tokens_per_second"), lambda rate: f"{rate:,.0f}"),
        Column("peak memory, GB", figure("memory_bytes"), gigabytes),
        Column("trained parameters", figure("trained_parameters"), lambda number: f"{number:,.0f}"),
        Column("checkpoint, MB", figure("checkpoint_bytes"), lambda size: f"{size / 1e6:,.1f}"),
    ), reference=OURS, comparison="ours with LoRA is faster by",
)  # fmt: skip
