"""``llmtrain generate TARGET``: text from the model of a run or checkpoint, streamed while it is sampled."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.base.checks import check_input, unicode_text
from llmtrain.base.format import visible
from llmtrain.base.invocation import Invocation
from llmtrain.base.outputs import check_output, is_stdout, is_stream, open_output
from llmtrain.data.chat.template import ChatTemplate, Message
from llmtrain.data.sources.documents import read_text
from llmtrain.data.sources.records import RecordReader, find_records
from llmtrain.inference.generate import generate, stream_text, without_first_space
from llmtrain.run.load import LoadedModel
from llmtrain.run.text_generation import GenerationSettings, check_generates, encoder_of, template_of

NO_PROMPT = "\n"  # the default of ``prompt``
AS_IT_IS, AS_TAUGHT = "none", "run"  # values of ``template``


@dataclass(frozen=True)
class Generate(GenerationSettings):
    """The settings of ``conf/generate.yaml``."""

    prompt: str
    file: str | None
    prompt_column: str
    output: str | None
    template: str
    num_samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        unicode_text(prompt=self.prompt)
        if self.file is not None:
            if self.prompt != NO_PROMPT:
                raise ValueError(f"prompt={self.prompt!r} and file={self.file}: give one of them, not both")
            check_input("file", self.file)
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: must be at least 1")
        if self.output is not None:
            path = Path(self.output)
            if self.file is None:
                raise ValueError(f"output={self.output}: is for file=…; the text of one prompt is printed")
            if path.suffix != ".jsonl" and not is_stream(self.output):
                raise ValueError(f"output={self.output}: a row for each text is written; name it {path.stem}.jsonl")
            check_output("output", self.output)


def main(settings: Generate, invocation: Invocation) -> int:
    """Stream texts to standard output; for a file of prompts a JSON row for each text, into ``output`` if given."""
    with settings.load(invocation.targets[0]) as trained:
        check_generates(trained, invocation.targets[0])
        writer = Writer(trained, settings)
        if settings.file is not None:
            write_rows(writer, settings)
            return 0
        for index in range(settings.num_samples):
            if index:
                print("\n" + "-" * 20)
            if settings.template == AS_IT_IS:
                write(settings.prompt)
            for piece in writer.texts(settings.prompt):
                write(piece)
            write("\n")
    return 0


class Writer:
    """A writer of texts that continue prompts; all samples draw from one sequence of random numbers."""

    def __init__(self, trained: LoadedModel, settings: Generate) -> None:
        self.trained, self.settings = trained, settings
        self.generator = settings.generator(trained.device)
        self.template: ChatTemplate | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.stop_texts: tuple[str, ...] = ()
        if settings.template != AS_IT_IS:
            self.template = template_of(trained, None if settings.template == AS_TAUGHT else settings.template, None)
            self.encoder = encoder_of(trained, self.template)
            self.stop_ids, self.stop_texts = self.encoder.stops(self.template)

    def texts(self, prompt: str) -> Iterator[str]:
        """The pieces of a text that continues ``prompt``, while it is sampled."""
        tokenizer, precision = self.trained.tokenizer, self.trained.precision
        if self.template is None:
            ids = tokenizer.encode_prompt(prompt)
        else:
            parts = self.template.render([Message("user", prompt)], add_generation_prompt=True)
            ids = self.encoder.prompt(parts)
        with precision.autocast():
            new = generate(
                self.trained.model,
                ids,
                max_tokens=self.settings.max_tokens,
                sampling=self.settings.sampling(),
                generator=self.generator,
                dtype=precision.dtype,
                end_of_text=tokenizer.end_of_text,
                stops=self.stop_ids,
            )
            pieces = stream_text(new, tokenizer.decode_bytes, self.stop_texts)
            yield from pieces if self.template is None else without_first_space(pieces)


def write_rows(writer: Writer, settings: Generate) -> None:
    """Write ``{"prompt", "text"}`` for each prompt of the file, and the other columns that its row has."""
    assert settings.file is not None
    with rows_to(settings.output) as write_row:
        for prompt, columns in read_prompts(settings.file, settings.prompt_column):
            for _ in range(settings.num_samples):
                write_row({**columns, "prompt": prompt, "text": "".join(writer.texts(prompt))})


def read_prompts(file: str, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prompts of ``file``, a line each of a .txt, a row each of anything else, with the other columns."""
    if Path(file).suffix == ".txt":
        for line in "".join(read_text(Path(file).expanduser())).splitlines():
            if line.strip():
                yield line, {}
        return
    reader = RecordReader()
    for path in find_records(file, "file"):
        for record in reader.read(path):
            others = {name: value for name, value in record.values.items() if name != column}
            yield record.text(column, "prompt_column"), others


@contextmanager
def rows_to(output: str | None) -> Iterator[Any]:
    """A function that writes a row; a file gets its name once it is complete."""
    if output is None or is_stdout(output):
        yield lambda row: write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return
    with open_output("output", output) as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def write(text: str) -> None:
    """Show ``text`` at once; control characters, which a terminal would obey, are shown as such."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
