"""litgpt's GPT with GPT-2's sizes, in the loop of its ``pretrain.py`` on Lightning Fabric.

Its model has no learned positions: it rotates a quarter of each head, as its Pythia configs do.  Embedding and output
layer are one matrix, as with its ``--train.tie_embeddings``.
"""

from typing import Any

from benchmarks.task import Task
from benchmarks.workers import Stopwatch, serve
from benchmarks.workers.peers import BETAS, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Windows, allow_tf32, start


def measure(task: Task) -> dict[str, Any]:
    """Train for so many steps."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.pretrain import initialize_weights
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

    torch.set_float32_matmul_precision("high")  # as its command does
    start(task)
    sizes = task.sizes
    config = Config(
        name="gpt2", block_size=task.context, vocab_size=sizes.vocab_size, padded_vocab_size=sizes.padded_vocab_size,
        n_layer=sizes.num_layers, n_head=sizes.num_heads, n_embd=sizes.hidden_size, rotary_percentage=0.25,
        parallel_residual=False, bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )  # fmt: skip
    precision = "bf16-mixed" if task.precision == "bf16" else "32-true"
    fabric = lightning.Fabric(accelerator=task.device, devices=1, precision=precision)
    fabric.launch()
    allow_tf32(task)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = task.context
    model = fabric.setup(torch.compile(model) if task.compiled else model)
    recipe = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "betas": BETAS}
    settings = {"class_path": "torch.optim.AdamW", "init_args": recipe}
    on_gpu = task.device == "cuda"
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(settings, model.parameters(), fused=on_gpu))
    windows: Any = Windows(task, extra=1)
    loader = torch.utils.data.DataLoader(windows, batch_size=task.batch_size, pin_memory=on_gpu)
    watch = Stopwatch(task)
    for batch in fabric.setup_dataloaders(loader):
        inputs = batch[:, : task.context].contiguous().long()
        targets = batch[:, 1:].contiguous().long()
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()  # its log_interval is 1
        if watch.step_done():
            break
    kernel = "fused" if on_gpu else "not fused"
    note = f"pretrain.py's loop ({precision}); its AdamW ({kernel} here); rotary positions instead of learned ones"
    return watch.result(note=note)


if __name__ == "__main__":
    serve(measure, "torch", "litgpt", "lightning")
