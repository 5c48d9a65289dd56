"""Seconds of a text of 60 tokens, and the kernels' share: ``python -m benchmarks.gpu.decoding``."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.case import print_row

TOKENS = 60
MODELS = {"124M": ("model=gpt124m",), "135M Llama": ("model=smollm2_135m", "model.vocab_size=null", "tokenizer=gpt2",
          "data.sequence_length=1024")}  # fmt: skip
SMALL = {"tiny": ("model=tiny", "tokenizer=byte", "data.sequence_length=64"),
         "tiny Llama": ("model=llama_tiny", "tokenizer=byte", "data.sequence_length=64")}  # fmt: skip


def main() -> None:
    """A row for each model: the first text, with all that is made once, and later ones."""
    from llmtrain.base.process import prepare_program

    prepare_program()
    for name, overrides in (SMALL if "--rehearse" in sys.argv else MODELS).items():
        with tempfile.TemporaryDirectory() as folder:
            decode(name, overrides, Path(folder) / "run")


def decode(name: str, overrides: tuple[str, ...], folder: Path) -> None:
    """Train a step, load the model as `llmtrain generate` does, and time it."""
    import torch

    from llmtrain import Run
    from llmtrain.base.runtime import Runtime
    from llmtrain.checkpoint.directory import locate_checkpoint
    from llmtrain.inference.generate import Sampling, generate
    from llmtrain.run.load import load_model

    Run.compose(
        *overrides, "data=python_docs", "loop.max_steps=1", "loop.eval_every=0", "loop.sample_every=0",
        "accumulation.batch_size=1", "accumulation.micro_batch_size=1", f"run_dir='{folder}'",
    ).train()  # fmt: skip
    with load_model(locate_checkpoint(folder), Runtime.for_inference("auto")) as trained:

        def text() -> float:
            generator = torch.Generator(trained.device).manual_seed(1)
            begin = time.perf_counter()
            with trained.precision.autocast():
                ids = list(
                    generate(
                        trained.model, trained.tokenizer.encode_prompt("\n"), max_tokens=TOKENS,
                        sampling=Sampling(0.8, 50, 1.0), generator=generator, dtype=trained.precision.dtype,
                        end_of_text=-1,
                    )
                )  # fmt: skip
            assert len(ids) == TOKENS
            return time.perf_counter() - begin

        first = text()
        later = [text() for _ in range(5)]
    seconds = statistics.median(later)
    print_row(
        f"{name}, {TOKENS} tokens", **{"first s": first, "later s": seconds, "ms a token": 1e3 * seconds / TOKENS}
    )


if __name__ == "__main__":
    main()
