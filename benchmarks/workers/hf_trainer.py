"""transformers' Trainer on its GPT-2, randomly initialised; all that is not the recipe is left at its defaults."""

from typing import Any

from benchmarks.task import Task
from benchmarks.workers import Stopwatch, serve
from benchmarks.workers.peers import BETAS, LEARNING_RATE, MAX_NORM, SEED, WEIGHT_DECAY, Windows, start


def measure(task: Task) -> dict[str, Any]:
    """Train for so many steps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    start(task)
    sizes = task.sizes
    config = GPT2Config(
        vocab_size=sizes.padded_vocab_size, n_positions=task.context, n_embd=sizes.hidden_size,
        n_layer=sizes.num_layers, n_head=sizes.num_heads, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return train(task, GPT2LMHeadModel(config))


def train(task: Task, model: Any, **more: Any) -> dict[str, Any]:
    """Train ``model`` with the recipe of all; ``more``: arguments of the Trainer.  A save has no part in the result."""
    import accelerate  # noqa: F401 - Trainer asks for it in more words
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    keywords: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True} | more
    arguments = TrainingArguments(
        output_dir=task.folder, per_device_train_batch_size=task.batch_size, max_steps=task.warm_up + task.steps,
        learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        max_grad_norm=MAX_NORM, seed=SEED, use_cpu=task.device == "cpu", bf16=task.precision == "bf16",
        tf32=task.precision != "fp32" if task.device == "cuda" else None, torch_compile=task.compiled,
        **keywords,
    )  # fmt: skip
    optimizer = getattr(arguments.optim, "value", arguments.optim)
    note = f"its default optimizer, {optimizer}; {model.config._attn_implementation} attention"
    watch = Stopwatch(task)
    result: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if watch.step_done():
                control.should_training_stop = True
                result.update(watch.result(note=note))

    class Examples(torch.utils.data.Dataset):
        windows = Windows(task, extra=0)

        def __len__(self) -> int:
            return len(self.windows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = self.windows[index]
            return {"input_ids": ids, "labels": ids}

    Trainer(model, arguments, train_dataset=Examples(), callbacks=[Watch()]).train()
    return result


if __name__ == "__main__":
    serve(measure, "torch", "transformers", "accelerate")
