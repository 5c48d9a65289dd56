"""``llmtrain generate TARGET``: text from a run's or a checkpoint's model, as it is sampled."""

import codecs
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain import config
from llmtrain.commands import Invocation
from llmtrain.format import visible
from llmtrain.inference import Sampling, generate
from llmtrain.model import LanguageModel
from llmtrain.run import Run
from llmtrain.runtime import Device, Runtime
from llmtrain.storage import CONFIG, MODEL, locate_checkpoint, verify_checkpoint
from llmtrain.tokenizer import Tokenizer
from llmtrain.weights.checkpoint import load_model


@dataclass(frozen=True)
class Generate:
    """The settings of ``conf/generate.yaml``."""

    prompt: str
    max_tokens: int
    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    device: Device
    plugins: list[str]

    def __post_init__(self) -> None:
        for key in ("max_tokens", "num_samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        self.sampling()

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)


def main(settings: Generate, invocation: Invocation) -> int:
    """Stream ``num_samples`` texts to standard output."""
    checkpoint = locate_checkpoint(invocation.targets[0])
    verify_checkpoint(checkpoint)
    run = Run.from_config(config.complete(config.untrusted(config.load(checkpoint / CONFIG), settings.plugins)))
    runtime = Runtime(
        device=settings.device,
        seed=0,
        deterministic=False,
        compile=False,
        cuda_graphs=False,
        profile=False,
        num_threads=None,
    )
    with runtime.session() as device:
        precision = run.precision.inference(device)
        tokenizer = run.tokenizer.build()
        model = load(run, tokenizer, checkpoint, device)
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        generator = torch.Generator(device).manual_seed(seed)
        with precision.arithmetic(), precision.autocast():
            for index in range(settings.num_samples):
                if index:
                    print("\n" + "-" * 20)
                ids = generate(
                    model,
                    tokenizer.encode(settings.prompt).tolist(),
                    max_tokens=settings.max_tokens,
                    sampling=settings.sampling(),
                    generator=generator,
                    dtype=precision.dtype,
                    end_of_text=tokenizer.end_of_text,
                )
                write(settings.prompt)
                decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
                for token in ids:
                    write(decoder.decode(tokenizer.decode_bytes([token])))
                write(decoder.decode(b"", final=True) + "\n")
    return 0


def load(run: Run, tokenizer: Tokenizer, checkpoint: Path, device: torch.device) -> LanguageModel:
    """The model of ``checkpoint``."""
    generator = torch.Generator(device).manual_seed(0)
    model = run.model.create(run.vocab_size(tokenizer), device, generator)
    run.lora.apply(model)
    load_model(model, checkpoint / MODEL)
    return model


def write(text: str) -> None:
    """Show ``text`` at once; control characters, which a terminal would obey, are shown as such."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
