"""``llmtrain generate TARGET``: text from a run's or a checkpoint's model, as it is sampled."""

import codecs
import secrets
import sys
from dataclasses import dataclass

import torch

from llmtrain.commands import Invocation
from llmtrain.format import visible
from llmtrain.inference import Sampling, generate
from llmtrain.run import Run
from llmtrain.runtime import Device, Runtime
from llmtrain.storage import locate_checkpoint


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
    base: str | None
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
    runtime = Runtime.for_inference(settings.device)
    with Run.load_trained(checkpoint, runtime, base=settings.base, plugins=settings.plugins) as trained:
        tokenizer, precision = trained.tokenizer, trained.precision
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        generator = torch.Generator(trained.device).manual_seed(seed)
        with precision.autocast():
            for index in range(settings.num_samples):
                if index:
                    print("\n" + "-" * 20)
                ids = generate(
                    trained.model,
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


def write(text: str) -> None:
    """Show ``text`` at once; control characters, which a terminal would obey, are shown as such."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
