"""Check an export: the written model must give the same logits in transformers or PEFT as here."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.base.format import significant
from llmtrain.base.named_generators import NamedGenerators
from llmtrain.config.exported_text import TEXTS as PROMPTS
from llmtrain.data.labelled import LabelledText
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.families import family_of_checkpoint
from llmtrain.hf.reading import load_weights
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.run.load import LoadedModel

RANDOM_IDS = 64  # drawn from the whole vocabulary, beside the texts
CLASSIFIER = "classifier"  # the head of a unit that tells classes apart
TOLERANCE = 1e-4  # of logits, of their largest: sums in another order differ by a tenth of it in a deep model


class ExportMismatch(Exception):
    """A written model that differs from the trained one."""


@dataclass(frozen=True)
class ReferenceLogits:
    """Prompts as ids, ``(sequence,)`` each, and a model's logits for them."""

    prompts: list[Tensor]
    logits: list[Tensor]  # (sequence, vocabulary), or (classes,)

    def difference(self, others: Sequence[Tensor]) -> float:
        """The largest absolute difference of a logit; NaN if either side has one."""
        return float(torch.stack([(a - b).abs().max() for a, b in zip(self.logits, others, strict=True)]).max())

    @property
    def allowed(self) -> float:
        """The largest difference allowed for rounding."""
        return TOLERANCE * max(1.0, *(float(each.abs().max()) for each in self.logits))


def check_logits(name: str, before: ReferenceLogits, after: Sequence[Tensor]) -> None:
    """Print the largest difference.  Raises :class:`ExportMismatch` if it is more than rounding."""
    difference = before.difference(after)
    if not difference <= before.allowed:
        raise ExportMismatch(f"loaded by {name}, its logits differ by up to {significant(difference)}")
    print(f"loaded by {name}: logits differ by up to {significant(difference) if difference else 0}")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- in this program ------------------------------------------------------------------------------------------------


def encode_prompts(trained: LoadedModel) -> list[Tensor]:
    """Prompts as ids: for a classifier as its run encodes texts."""
    model, data = trained.model, trained.run.data
    if isinstance(data, LabelledText):
        encode = data.encoder(trained.tokenizer)
        return [torch.from_numpy(encode(text).inputs.astype("int64")) for text in PROMPTS]
    texts = [torch.tensor(trained.tokenizer.encode_prompt(text)) for text in PROMPTS]
    texts.append(torch.randint(model.vocab_size, (RANDOM_IDS,), generator=torch.Generator().manual_seed(0)))
    return [ids[: model.context_length] for ids in texts if len(ids)]


def reference_logits(trained: LoadedModel) -> ReferenceLogits:
    """The logits of a run's model, fp32."""
    prompts = encode_prompts(trained)
    return ReferenceLogits(prompts, compute_logits(trained.unit.model, trained.unit.heads.get(CLASSIFIER), prompts))


@torch.no_grad()
def compute_logits(model: LanguageModel, classifier: nn.Module | None, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits for each of ``prompts``: of the next tokens, or of the classes where there is a ``classifier``."""
    if classifier is not None:
        return [classifier(model.hidden(ids[None])[0, -1]).float() for ids in prompts]
    return [model(ids[None])[0, :, : model.vocab_size].float() for ids in prompts]


def reloaded_logits(folder: Path, config: ModelConfig, classes: int, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Load the directory into a new model and compute its logits; ``config`` is that of the written model."""
    json = ConfigJson.read(folder)
    found: Any = family_of_checkpoint(json).read_config(json)
    found = replace(found, context_length=config.context_length)  # of dynamic scaling, config.json has the original
    model = found.create(found.vocab_size, torch.device("cpu"), NamedGenerators(1)).eval()
    classifier = nn.Linear(model.head_weight.shape[1], classes, bias=False) if classes else None
    with quiet_loading():
        load_weights(model, folder, classifier)
    return compute_logits(model, classifier, prompts)


# --- in other programs ----------------------------------------------------------------------------------------------


def transformers_logits(folder: Path, trained: LoadedModel, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The logits of what transformers loads; of a classifier with its tokenizer, all texts as one padded batch."""
    with quiet_loading():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        is_classifier = CLASSIFIER in trained.unit.heads
        auto = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(str(folder), dtype=torch.float32)
        if is_classifier and tokenizer.pad_token is not None:
            batch = tokenizer(list(PROMPTS), padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                return list(model.eval()(**batch).logits)
        return _module_logits(model, prompts)


def peft_logits(base: str, folder: Path, classes: int, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Load the base and the adapters with PEFT and compute the logits."""
    with quiet_loading():
        import peft
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if classes:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=classes, dtype=torch.float32
            )
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return _module_logits(peft.PeftModel.from_pretrained(model, str(folder)), prompts)


@torch.no_grad()
def _module_logits(module: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    module.eval()
    return [module(ids[None]).logits[0] for ids in prompts]


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the messages and warnings of loading a model that was just written."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
