"""Fine-tuning with transformers' Trainer: of all weights of its GPT-2, or of PEFT's adapters in it."""

from pathlib import Path
from typing import Any

from benchmarks.suites.lora import ALPHA, PEFT, RANK
from benchmarks.task import Task
from benchmarks.workers import bytes_below, serve
from benchmarks.workers.gpt2_base import base
from benchmarks.workers.hf_trainer import train
from benchmarks.workers.peers import start


def measure(task: Task) -> dict[str, Any]:
    """Train for so many steps; the Trainer's checkpoint after them has no part in speed and memory."""
    from transformers import GPT2LMHeadModel

    path = base(task)
    start(task)
    model: Any = GPT2LMHeadModel.from_pretrained(path)
    if task.contestant == PEFT:
        from peft import LoraConfig, get_peft_model

        # every linear layer of the blocks
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, config)
    result = train(task, model, save_strategy="steps", save_steps=task.warm_up + task.steps)
    (checkpoint,) = Path(task.folder).glob("checkpoint-*")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return result | {"trained_parameters": trained, "checkpoint_bytes": bytes_below(checkpoint)}


if __name__ == "__main__":
    serve(measure, "torch", "transformers", "accelerate", "peft")
