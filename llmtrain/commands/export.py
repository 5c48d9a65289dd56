"""``llmtrain export TARGET to=DIR``: a run's model in the form that transformers or PEFT load.

Everything is written into a directory beside ``to``, loaded back, compared with the model that it was written from, and
renamed.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from llmtrain.base.checks import positive
from llmtrain.base.format import significant, size
from llmtrain.base.invocation import FAILED, FINISHED, Invocation
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.base.outputs import check_output_directory, naming
from llmtrain.base.runtime import Runtime
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.config.assemble import build_unit
from llmtrain.config.exported_text import encoder_of_data, template_of_data, text_files, written_differently
from llmtrain.config.run_config import RunConfig
from llmtrain.data.labelled import LabelledText
from llmtrain.hf import CLASSIFIER, SCORE, config_of
from llmtrain.hf.base_files import BaseFiles
from llmtrain.hf.classifier_tokenizer import PAD, add_classifier_tokens, find_padding, next_id
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.directory import locate_directory
from llmtrain.hf.families import family_of_model, module_names
from llmtrain.hf.peft import export_adapter, import_adapter
from llmtrain.hf.tokenizer_export import FILE, splits_as_qwen
from llmtrain.hf.writing import config_json, is_transposed, write_checkpoint
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.lora.merge import merge
from llmtrain.lora.quantization import Quantization
from llmtrain.lora.targets import HEAD
from llmtrain.run.load import LoadedModel, MovedFiles, load_model
from llmtrain.tokenizer.directory import TEMPLATE
from llmtrain.tokenizer.huggingface import HuggingFaceTokenizer
from llmtrain.verify.logits import (
    ExportMismatch,
    check_logits,
    compute_logits,
    is_installed,
    peft_logits,
    reference_logits,
    reloaded_logits,
    transformers_logits,
)
from llmtrain.verify.texts import check_texts
from llmtrain.weights.huggingface import HuggingFace


class Format(Enum):
    """The format of the files: by the library that loads them."""

    huggingface = "huggingface"
    peft = "peft"


class DType(Enum):
    """The type of the weights in the files."""

    fp32 = torch.float32
    bf16 = torch.bfloat16
    fp16 = torch.float16


STORED = {"float32": DType.fp32, "bfloat16": DType.bf16, "float16": DType.fp16}  # as config.json spells it


@dataclass(frozen=True)
class Export:
    """The settings of ``conf/export.yaml``."""

    to: str
    format: Format
    dtype: DType | None
    shard_gb: float
    weights: MovedFiles
    tokenizer: MovedFiles
    plugins: list[str]

    def __post_init__(self) -> None:
        positive(shard_gb=self.shard_gb)
        path = Path(self.to)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"to={self.to}: something that is not a directory has this name; name a new directory")
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"to={self.to}: not empty, and nothing is overwritten; name a new directory")
        check_output_directory("to", self.to)
        if self.format is Format.peft and self.dtype is not None:
            raise ValueError(f"dtype={self.dtype.name}: adapters are written as they were trained; leave it out")


def main(settings: Export, invocation: Invocation) -> int:
    """Write, load back, compare, rename; return 1 if the files do not hold the model."""
    checkpoint = locate_checkpoint(invocation.targets[0])
    to = Path(settings.to).absolute()
    temporary = to.with_name(f".tmp-{to.name}-{os.getpid()}")
    # On the CPU, which computes in fp32.
    loaded = load_model(
        checkpoint, Runtime.for_inference("cpu"), base=settings.weights.path,
        tokenizer_path=settings.tokenizer.path, plugins=settings.plugins,
    )  # fmt: skip
    try:
        with loaded as trained:
            with naming("to", settings.to):
                to.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
            write = write_model if settings.format is Format.huggingface else write_adapters
            write(settings, trained, temporary)
        with naming("to", settings.to):
            if to.is_dir():
                to.rmdir()  # an empty one
            temporary.rename(to)
    except ExportMismatch as error:
        print(f"{to}: not written: {error}", file=sys.stderr)
        return FAILED
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{to}: {size(sum(path.stat().st_size for path in to.iterdir()))}")
    return FINISHED


# --- the whole model ----------------------------------------------------------------------------------------------


def write_model(settings: Export, trained: LoadedModel, folder: Path) -> None:
    """Write the model, adapters merged: ``format=huggingface``."""
    unit, run, labels = trained.unit, trained.run, trained.state.labels
    model = unit.model
    dtype = (settings.dtype or type_of_base(run)).value
    contents, pad = tokenizer_files(trained, may_add=True)
    base = BaseFiles.read(base_folder(run))
    tokens = base.tokens({"bos_token_id": bos_id(trained), "eos_token_id": trained.tokenizer.end_of_text,
                          "pad_token_id": pad})  # fmt: skip
    multi_label = bool(getattr(run.objective, "multi_label", False))
    is_qwen = splits_as_qwen(contents[FILE])

    def config() -> dict[str, Any]:
        values = config_json(unit, dtype, tokens, labels, multi_label, has_qwen_tokenizer=is_qwen)
        return values | base.positions(config_of(model), values)

    values = config()  # may refuse the model: before anything is computed
    is_tied = not hasattr(model, HEAD)
    merge(model, has_output=unit.uses_output_layer)
    unit.has_base = False
    if is_tied and hasattr(model, HEAD):
        values = config()
        print("the output layer, which was the embedding, is now a separate matrix: the adapter is for the input alone")
    before = reference_logits(trained)
    if dtype != torch.float32:
        with torch.no_grad():
            for parameter in unit.parameters():
                parameter.copy_(parameter.to(dtype))
        rounded = reference_logits(trained)
        change = significant(before.difference(rounded.logits))
        print(f"rounded to {str(dtype).removeprefix('torch.')}: logits change by up to {change}")
        before = rounded
    generation = base.generation_config(tokens, ends_of(trained))
    write_checkpoint(unit, folder, values, generation, dtype=dtype, shard_bytes=round(settings.shard_gb * 1e9))
    write_files(contents, folder)
    for change in (*base.changes(values, generation), *changes_of_tokenizer(trained, contents)):
        print(change)
    unit.to_empty(device="meta")  # frees its memory before the copy is loaded
    check_logits("this program", before, reloaded_logits(folder, config_of(model), len(labels), before.prompts))
    if not is_installed("transformers"):
        print("with transformers: not compared; it is not installed")
    elif values["model_type"] == "baichuan":
        print("with transformers: not compared; it has no Baichuan model")
    else:
        check_logits("transformers", before, transformers_logits(folder, trained, before.prompts))
        print(check_texts(folder, trained))


def type_of_base(run: RunConfig) -> DType:
    """The default type of merged weights in the files."""
    if run.lora.adapts and isinstance(run.weights, HuggingFace):
        values = ConfigJson.read(locate_directory(run.weights.path)).values
        return STORED.get(str(values.get("dtype") or values.get("torch_dtype")), DType.fp32)
    return DType.fp32


def base_folder(run: RunConfig) -> Path | None:
    """The directory of transformers that the run started from; None if there is none, or no longer."""
    if not isinstance(run.weights, HuggingFace):
        return None
    try:
        return locate_directory(run.weights.path)
    except ValueError:
        print(f"weights.path={run.weights.path}: no longer there, so its generation settings are not in the export")
        return None


def bos_id(trained: LoadedModel) -> int | None:
    """The id of the token named ``bos_token``, or else of the one put before a text."""
    tokenizer = trained.tokenizer
    return tokenizer.special_tokens.get(tokenizer.named_tokens.get("bos_token", ""), tokenizer.bos)


def changes_of_tokenizer(trained: LoadedModel, contents: dict[str, str]) -> Iterator[str]:
    """Yield the parts of the tokenizer's files that are not as they were, in words."""
    tokenizer = trained.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer) and (parts := written_differently(contents, tokenizer.source)):
        yield f"{FILE}: {', '.join(parts)} as training read the files, no longer as in {tokenizer.file}"
    before, after = tokenizer.chat_template, contents.get(TEMPLATE)
    if before is not None and after != before:
        template = getattr(trained.run.data, "template", "")
        yield f"{TEMPLATE}: data.template={template}, which the run was trained in; no longer the tokenizer's own"


def ends_of(trained: LoadedModel) -> list[int]:
    """The ids that end a text, and those that end a response in the run's template."""
    end, template = trained.tokenizer.end_of_text, template_of_data(trained.run, trained.tokenizer)
    if template is None:
        return [end]
    stops = encoder_of_data(trained.run, trained.tokenizer, template).stops(template)[0]
    return [end, *sorted(stops - {end})]


def tokenizer_files(trained: LoadedModel, *, may_add: bool) -> tuple[dict[str, str], int | None]:
    """The files of the tokenizer by name, and the id of the token that pads texts for a classifier.

    A classifier of transformers reads the last token that is not padding.  If that is the end-of-text token, it cannot
    serve as padding too: a padding token is then added behind the vocabulary, where ``may_add`` permits it.
    """
    tokenizer, data = trained.tokenizer, trained.run.data
    if not isinstance(data, LabelledText):
        base = BaseFiles.read(base_folder(trained.run))
        longest = base.tokenizer.get("model_max_length") or trained.model.context_length
        return text_files(trained.run, tokenizer, longest), None
    contents = text_files(trained.run, tokenizer, data.sequence_length)
    pad = find_padding(tokenizer, contents)
    if pad is None and not data.append_end_of_text:
        names = {id: name for name, id in tokenizer.special_tokens.items()}
        pad = names[tokenizer.end_of_text], tokenizer.end_of_text
    if pad is None and may_add:
        pad = PAD, next_id(contents)
    contents = add_classifier_tokens(contents, tokenizer, ends=data.append_end_of_text, pad=pad)
    return contents, None if pad is None else pad[1]


def write_files(contents: dict[str, str], folder: Path) -> None:
    """Write text files, given by name."""
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


# --- the adapters -------------------------------------------------------------------------------------------------


def write_adapters(settings: Export, trained: LoadedModel, folder: Path) -> None:
    """Write the adapters alone: ``format=peft``."""
    unit, run, labels = trained.unit, trained.run, trained.state.labels
    model = unit.model
    if not isinstance(run.lora, LowRankAdaptation):
        raise ValueError(
            "format=peft: this run trained the weights themselves and has no adapters; take format=huggingface"
        )
    family = family_of_model(config_of(model))
    names = module_names(model) | {CLASSIFIER.removesuffix(".weight"): SCORE.removesuffix(".weight")}
    kind = family.write_config(config_of(model), model.vocab_size)["model_type"]
    base = str(locate_directory(run.weights.path).resolve()) if isinstance(run.weights, HuggingFace) else None
    before = reference_logits(trained)
    transposed = is_transposed(family, model, kind)
    export_adapter(unit, run.lora, names, folder, base=base, fan_in_fan_out=transposed)
    contents, pad = tokenizer_files(trained, may_add=False)  # the base stays as it is
    write_files(contents, folder)
    if labels and pad is None:
        print("its tokenizer has no padding token: texts have to be classified one at a time")
    generators = NamedGenerators(1)
    copy = build_unit(run, model.vocab_size, labels, torch.device("cpu"), generators, load_weights=False).eval()
    import_adapter(copy, run.lora, names, folder)
    check_logits("this program", before, compute_logits(copy.model, copy.heads.get("classifier"), before.prompts))
    reason = ""
    if base is None:
        reason = "the base is another run's: export that too, and name it to PeftModel.from_pretrained"
    elif kind == "baichuan":
        reason = "transformers has no Baichuan model"
    elif not (is_installed("peft") and is_installed("transformers")):
        reason = "it is not installed"
    elif run.lora.quantization is not Quantization.none:
        reason = "its base would not be quantised"
    if reason or base is None:
        print(f"with PEFT: not compared; {reason}")
    else:
        check_logits("PEFT", before, peft_logits(base, folder, len(labels), before.prompts))
    if is_installed("transformers"):
        print(check_texts(folder, trained))
