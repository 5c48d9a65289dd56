"""``llmtrain export TARGET to=DIR``: a run's model as transformers or PEFT load it, loaded back before it is there.

Everything is written into a directory beside ``to``, compared with the model that it was written from, and renamed.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.checks import positive
from llmtrain.commands import FAILED, FINISHED, Invocation
from llmtrain.conversation import template_of
from llmtrain.data.template_to_jinja import to_jinja
from llmtrain.data.templates import Markup, PartEncoder, Template
from llmtrain.format import significant, size
from llmtrain.hf import CLASSIFIER, SCORE, config_of, family_for, family_of, module_names
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.directory import locate
from llmtrain.hf.peft import export_adapter, import_adapter
from llmtrain.hf.reading import load
from llmtrain.hf.writing import config_json, is_transposed, write
from llmtrain.lora.low_rank import LowRank
from llmtrain.lora.merge import merge
from llmtrain.lora.quantization import Quantization
from llmtrain.model import LanguageModel
from llmtrain.run import Run, Trained
from llmtrain.runtime import Device, Runtime
from llmtrain.storage import locate_checkpoint
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.to_huggingface import files
from llmtrain.weights.huggingface import HuggingFace

# What both sides are asked: text in a few languages, code, and ids from all over the vocabulary.
PROMPTS = ("The quick brown fox jumps over", "def area(r):\n    return 3.14159 * r", "Füße, 你好, привет 🙂 1234")
RANDOM_IDS = 64
TOLERANCE = 1e-4  # of logits, of their largest: sums in another order differ by a tenth of it in a deep model


class Format(Enum):
    """For whom."""

    huggingface = "huggingface"
    peft = "peft"


class DType(Enum):
    """Of the weights in the files."""

    fp32 = torch.float32
    bf16 = torch.bfloat16
    fp16 = torch.float16


STORED = {"float32": DType.fp32, "bfloat16": DType.bf16, "float16": DType.fp16}  # as config.json says it


@dataclass(frozen=True)
class Export:
    """The settings of ``conf/export.yaml``."""

    to: str
    format: Format
    dtype: DType | None
    shard_gb: float
    base: str | None
    plugins: list[str]

    def __post_init__(self) -> None:
        positive(shard_gb=self.shard_gb)
        path = Path(self.to)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ValueError(f"to={self.to}: there is something else of that name; name a new directory")
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"to={self.to}: not empty; nothing is written over, name a new directory")
        if self.format is Format.peft and self.dtype is not None:
            raise ValueError(f"dtype={self.dtype.name}: adapters are written as they were trained; leave it out")


@dataclass(frozen=True)
class Answers:
    """Prompts as ids, ``(sequence,)`` each, and the logits that a model gave."""

    prompts: list[Tensor]
    logits: list[Tensor]  # (sequence, vocabulary), or (classes,)

    def difference(self, others: Sequence[Tensor]) -> float:
        """The largest difference of a logit; NaN where either has one."""
        return max(float((a - b).abs().max()) for a, b in zip(self.logits, others, strict=True))

    @property
    def allowed(self) -> float:
        """How large it may be."""
        return TOLERANCE * max(1.0, *(float(each.abs().max()) for each in self.logits))


class Differs(Exception):
    """What was written is not what was trained."""


def main(settings: Export, invocation: Invocation) -> int:
    """Write, load back, compare, rename; 1 if what was written is not the model."""
    checkpoint = locate_checkpoint(invocation.targets[0])
    to = Path(settings.to).absolute()
    temporary = to.with_name(f".tmp-{to.name}-{os.getpid()}")
    # On the host, whose arithmetic is that of fp32.
    loaded = Run.load_trained(
        checkpoint, Runtime.for_inference(Device.cpu), base=settings.base, plugins=settings.plugins
    )
    try:
        with loaded as trained:
            to.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            one = whole if settings.format is Format.huggingface else adapter
            one(settings, trained, temporary)
        if to.is_dir():
            to.rmdir()  # an empty one
        temporary.rename(to)
    except Differs as error:
        print(f"{to}: not written: {error}")
        return FAILED
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{to}: {size(sum(path.stat().st_size for path in to.iterdir()))}")
    return FINISHED


# --- the whole model ----------------------------------------------------------------------------------------------


def whole(settings: Export, trained: Trained, folder: Path) -> None:
    """``format=huggingface``."""
    model, tokenizer, run = trained.model, trained.tokenizer, trained.run
    labels, multi_label = trained.state.labels, bool(getattr(run.objective, "multi_label", False))
    dtype = (settings.dtype or type_of_base(run)).value
    # Refused before anything is computed, if it is
    values = config_json(model, dtype, tokens_of(tokenizer, model), labels, multi_label)
    merge(model)
    before = ask(model, tokenizer)
    if dtype != torch.float32:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        rounded = ask(model, tokenizer)
        print(f"rounded to {str(dtype).removeprefix('torch.')}: logits change by up to "
              f"{significant(before.difference(rounded.logits))}")  # fmt: skip
        before = rounded
    generation = {"eos_token_id": ends_of(trained)}
    write(model, folder, values, generation, dtype=dtype, shard_bytes=round(settings.shard_gb * 1e9))
    write_tokenizer(trained, folder)
    config = config_of(model)
    hidden = model.head_weight.shape[1]
    model.to_empty(device="meta")  # its memory goes before the copy's comes
    compare("this program", before, read_back(folder, config, model.vocab_size, hidden, labels, before.prompts))
    if not has("transformers"):
        print("with transformers: not compared, it is not installed")
    elif values["model_type"] == "baichuan":
        print("with transformers: not compared, it has no Baichuan of its own")
    else:
        compare("transformers", before, ask_transformers(folder, tokenizer, before.prompts, bool(labels)))


def type_of_base(run: Run) -> DType:
    """The type that merged weights are stored in unless the user names one."""
    if run.lora.adapts and isinstance(run.weights, HuggingFace):
        values = ConfigJson.read(locate(run.weights.path)).values
        return STORED.get(str(values.get("dtype") or values.get("torch_dtype")), DType.fp32)
    return DType.fp32


def tokens_of(tokenizer: Tokenizer, model: LanguageModel) -> dict[str, int | None]:
    """Ids that ``config.json`` names; a classifier reads the last token that is no padding."""
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.end_of_text}
    return tokens | {"pad_token_id": padding(tokenizer)} if hasattr(model, "classifier") else tokens


def padding(tokenizer: Tokenizer) -> int:
    """The id of what pads a text: a token for it, or the one that ends texts."""
    named = (id for name, id in tokenizer.special_tokens.items() if name.strip("<|>[]").lower() == "pad")
    return next(named, tokenizer.end_of_text)


def taught(trained: Trained) -> Template | None:
    """The template of the run's instructions; None for other data."""
    return template_of(trained, None, None) if hasattr(trained.run.data, "template") else None


def ends_of(trained: Trained) -> int | list[int]:
    """The ids that end a text, and those that end a response in the run's template."""
    end, template = trained.tokenizer.end_of_text, taught(trained)
    others = set() if template is None else PartEncoder(trained.tokenizer).stops(template)[0] - {end}
    return [end, *sorted(others)] if others else end


def write_tokenizer(trained: Trained, folder: Path) -> None:
    """The files of the tokenizer, and the template that the model was taught."""
    tokenizer, template = trained.tokenizer, taught(trained)
    source = to_jinja(template, has_bos=tokenizer.bos is not None) if isinstance(template, Markup) else None
    for name, text in files(tokenizer, trained.model.context_length, source).items():
        (folder / name).write_text(text, encoding="utf-8")


# --- the adapters -------------------------------------------------------------------------------------------------


def adapter(settings: Export, trained: Trained, folder: Path) -> None:
    """``format=peft``."""
    model, run, labels = trained.model, trained.run, trained.state.labels
    if not isinstance(run.lora, LowRank):
        raise ValueError(
            "format=peft: this run trained the weights themselves and has no adapters; take format=huggingface"
        )
    family = family_for(config_of(model))
    names = module_names(model) | {CLASSIFIER.removesuffix(".weight"): SCORE.removesuffix(".weight")}
    kind = family.write_config(config_of(model), model.vocab_size)["model_type"]
    base = str(locate(run.weights.path).resolve()) if isinstance(run.weights, HuggingFace) else None
    before = ask(model, trained.tokenizer)
    transposed = is_transposed(family, model, kind)
    export_adapter(model, run.lora, names, folder, base=base, fan_in_fan_out=transposed)
    write_tokenizer(trained, folder)
    generator = torch.Generator().manual_seed(1)
    copy = run.make_model(model.vocab_size, labels, torch.device("cpu"), generator, load_weights=False).eval()
    import_adapter(copy, run.lora, names, folder)
    compare("this program", before, answer(copy, before.prompts))
    reason = ""
    if base is None:
        reason = "the base is another run's: export that too, and name it to PeftModel.from_pretrained"
    elif kind == "baichuan":
        reason = "transformers has no Baichuan of its own"
    elif not (has("peft") and has("transformers")):
        reason = "it is not installed"
    elif run.lora.quantization is not Quantization.none:
        reason = "its base would not be quantised"
    if reason or base is None:
        print(f"with PEFT: not compared, {reason}")
    else:
        compare("PEFT", before, ask_peft(base, folder, before.prompts, len(labels)))


def ask_peft(base: str, folder: Path, prompts: Sequence[Tensor], classes: int) -> list[Tensor]:
    """The logits of the base with the adapters, as PEFT loads them."""
    with quiet():
        import peft
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if classes:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=classes, dtype=torch.float32
            )
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return ask_module(peft.PeftModel.from_pretrained(model, str(folder)), prompts)


# --- asking -------------------------------------------------------------------------------------------------------


def prompts_of(tokenizer: Tokenizer, model: LanguageModel) -> list[Tensor]:
    """What both sides are asked, as ids that the model has room for."""
    texts = [torch.from_numpy(tokenizer.encode(text).astype("int64")) for text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    texts.append(torch.randint(model.vocab_size, (RANDOM_IDS,), generator=generator))
    pad = padding(tokenizer)
    prompts = [ids[: model.context_length] for ids in texts if len(ids)]
    return [ids[ids != pad] for ids in prompts] if hasattr(model, "classifier") else prompts


def ask(model: LanguageModel, tokenizer: Tokenizer) -> Answers:
    """The logits of ``model``, fp32."""
    prompts = prompts_of(tokenizer, model)
    return Answers(prompts, answer(model, prompts))


@torch.no_grad()
def answer(model: LanguageModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits for each of ``prompts``: of the next tokens, or of the classes."""
    if hasattr(model, "classifier"):
        classifier: Any = model.classifier
        return [classifier(model.hidden(ids[None])[0, -1]).float() for ids in prompts]
    return [model(ids[None])[0, :, : model.vocab_size].float() for ids in prompts]


def read_back(
    folder: Path, config: Any, vocab_size: int, hidden: int, labels: Sequence[str], prompts: Sequence[Tensor]
) -> list[Tensor]:
    """The logits of a new model that the directory is loaded into."""
    json = ConfigJson.read(folder)
    found: Any = family_of(json).read_config(json)
    found = replace(found, context_length=config.context_length)  # of dynamic scaling, config.json has the original
    model = found.create(vocab_size, torch.device("cpu"), torch.Generator().manual_seed(1)).eval()
    if labels:
        model.classifier = nn.Linear(hidden, len(labels), bias=False)
    with quiet():
        load(model, folder)
    return answer(model, prompts)


def ask_transformers(
    folder: Path, tokenizer: Tokenizer, prompts: Sequence[Tensor], is_classifier: bool
) -> list[Tensor]:
    """The logits of what transformers loads.  Raises :class:`Differs` if it splits a text otherwise."""
    with quiet():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        splits = transformers.AutoTokenizer.from_pretrained(str(folder))
        for text in PROMPTS:
            theirs = splits(text, add_special_tokens=False)["input_ids"]
            if theirs != tokenizer.encode(text).tolist():
                raise Differs(f"transformers' tokenizer splits {text!r} otherwise")
        auto = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
        return ask_module(auto.from_pretrained(str(folder), dtype=torch.float32), prompts)


@torch.no_grad()
def ask_module(module: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of a model of transformers' or PEFT's."""
    module.eval()
    return [module(ids[None]).logits[0] for ids in prompts]


def compare(name: str, before: Answers, after: Sequence[Tensor]) -> None:
    """Print the largest difference.  Raises :class:`Differs` if it is more than rounding."""
    difference = before.difference(after)
    if not difference <= before.allowed:
        raise Differs(f"loaded by {name}, its logits differ by up to {significant(difference)}")
    print(f"loaded by {name}: logits differ by up to {significant(difference) if difference else 0}")


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars of loading what has just been written."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
