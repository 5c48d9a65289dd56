"""Load the weights of a checkpoint directory into a model of ours, tensor by tensor."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.base.format import setting
from llmtrain.hf import BUFFERS, CLASSIFIER, HEAD, ModelFamily, TensorMap, config_of
from llmtrain.hf.directory import CheckpointDirectory
from llmtrain.hf.families import family_of_checkpoint, with_classifier
from llmtrain.hf.rope import CHANGES
from llmtrain.model import LanguageModel, ModelConfig

log = logging.getLogger(__name__)

# Keys that may differ from the checkpoint: sizes, which are compared tensor by tensor, and keys that do not change the
# meaning of the weights.
FREE = {
    "context_length", "vocab_size", "dropout", "initialisation", "initial_std", "tie_embeddings", "fused_qkv",
    "qkv_bias", "output_bias", "mlp_bias", "head_size",
}  # fmt: skip
# Keys that may differ on purpose, for instance to read longer texts: the difference is reported.
REPORTED = {*CHANGES, "sliding_window", "sliding_window_from_layer", "logit_softcap"}
AUTO_REMEDY = "take model=auto, the model of config.json; if it is that already, download the files again"


class Parts(Protocol):
    """The parts of a model's parameters that a rank holds."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the whole parameters, without vocabulary padding."""

    def holds(self, name: str) -> bool:
        """Return whether the rank has a part of the parameter."""

    def put(self, name: str, whole: Tensor) -> None:
        """Take this rank's parts of ``whole``."""


@torch.no_grad()
def load_weights(
    model: LanguageModel, folder: Path, classifier: nn.Linear | None = None, *, into: Parts | None = None
) -> None:
    """Fill ``model`` in place with the weights of a directory, on its device and in its type; ``classifier`` too.

    ``into``: the parts to fill, where the model has no whole parameters.  Never more than the tensors of one layer are
    in memory.
    Raises ValueError for a configuration of another model and, in one message, for tensors that are missing, unknown or
    of another shape.
    """
    with CheckpointDirectory(folder) as directory:
        directory.config.check_architecture(is_classifier=classifier is not None)
        family = family_of_checkpoint(directory.config)
        check_config(model, family, directory)
        if into is None:
            state = model.state_dict()
        else:
            state = {name: torch.empty(shape, device="meta") for name, shape in into.shapes().items()}
        kind = directory.config.text("model_type")
        maps = family.names(config_of(model), kind)
        if classifier is not None:
            maps = with_classifier(maps)
            state.pop("head.weight", None)  # a classifier has none
            state[CLASSIFIER] = classifier.weight
        maps = resolve_names(maps, family, directory)
        check_tensors(maps, state, family, directory)
        check_head(family, directory, maps)
        for each in maps:
            copy_tensors(each, state, directory, into)
    for note in describe_differences(model, maps, directory):
        log.info("%s: %s", folder, note)


def check_config(model: LanguageModel, family: ModelFamily, directory: CheckpointDirectory) -> None:
    """Raise ValueError if ``model`` computes something other than the checkpoint's; report intended differences."""
    config, theirs = config_of(model), family.read_config(directory.config)
    file = directory.config.file
    if type(config) is not type(theirs):
        raise ValueError(
            f"{file}: model_type={directory.config.text('model_type')}, and the model is a {type(model).__name__}; "
            "take model=auto"
        )
    keys = [field.name for field in fields(config) if field.name not in FREE]  # type: ignore[arg-type]
    different = [key for key in keys if getattr(config, key) != getattr(theirs, key)]
    wrong = [key for key in different if key not in REPORTED]
    if wrong:
        listed = ", ".join(f"model.{key}={_shown(config, key)} ({_shown(theirs, key)} there)" for key in wrong)
        raise ValueError(f"{listed}: not as in {file}; take model=auto, the model of the checkpoint")
    for key in different:
        log.warning("model.%s=%s, in %s it is %s", key, _shown(config, key), file, _shown(theirs, key))
    for key in directory.config.unknown():
        value = setting(directory.config.values[key])
        log.warning("%s: %s=%s is unknown and was ignored", file, key, value[:80])


def _shown(config: ModelConfig, key: str) -> str:
    value = getattr(config, key)
    return setting(getattr(value, "name", value))


def resolve_names(maps: list[TensorMap], family: ModelFamily, directory: CheckpointDirectory) -> list[TensorMap]:
    """``maps`` with the tensor names of this directory.

    The names in a checkpoint of a bare model, without a head, lack the prefix.  The head of a checkpoint that is tied,
    and holds none, is the embedding.
    """
    names = directory.shapes.keys()
    is_bare = not any(name.startswith(family.prefix) for name in names)
    is_tied = directory.config.is_tied and HEAD not in names
    settled = []
    for each in maps:
        theirs = (family.embedding,) if is_tied and each.theirs == (HEAD,) else each.theirs
        if is_bare:
            theirs = tuple(name.removeprefix(family.prefix) for name in theirs)
        settled.append(TensorMap(each.ours, theirs, each.rows, each.transposed, each.may_be_longer, each.zeros))
    return settled


def shapes_of(each: TensorMap, state: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Shapes of their tensors in a map."""
    if not each.ours:
        return [each.zeros]
    rows, *others = state[each.ours[0]].shape
    if each.transposed:
        (outputs,) = others
        return [(outputs, rows)]
    total = sum(len(state[name]) for name in each.ours)
    return [(count, *others) for count in each.rows or (total,)]


def check_tensors(
    maps: Iterable[TensorMap], state: Mapping[str, Tensor], family: ModelFamily, directory: CheckpointDirectory
) -> None:
    """Raise ValueError unless ``maps`` account for every tensor of the model and of the directory."""
    mapped = {name for each in maps for name in each.ours}
    assert mapped == state.keys(), mapped ^ state.keys()
    problems, known, remedies = [], {HEAD}, set()
    for each in maps:
        for name, shape in zip(each.theirs, shapes_of(each, state), strict=True):
            known.add(name)
            found = directory.shapes.get(name)
            if found is None:
                problems.append(f"{name} is missing")
            elif each.may_be_longer and found[1:] == shape[1:]:
                if found[0] < shape[0]:
                    problems.append(
                        f"{name} has {found[0]} positions, model.context_length={shape[0]}: the model is longer than "
                        "its positions"
                    )
                    remedies.add(f"take model.context_length={found[0]}")
            elif found != shape:
                problems.append(f"{name} is {found}, the model's is {shape}")
                if found[1:] == shape[1:] and shape[0] == len(state["token_embedding.weight"]):
                    remedies.add(f"model.vocab_size={found[0]}, or model=auto, takes all rows of the vocabulary")
    unexpected = [n for n in directory.shapes if n not in known and not BUFFERS.fullmatch(n)]
    problems += [f"{name} is unknown" for name in unexpected]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedies = remedies or {AUTO_REMEDY}
        remedy = "".join(f"; {text}" for text in sorted(remedies))
        raise ValueError(
            f"weights.path={directory.folder}: does not fit the model: {'; '.join(problems[:3])}{more}{remedy}"
        )


def check_head(family: ModelFamily, directory: CheckpointDirectory, maps: Iterable[TensorMap]) -> None:
    """Raise ValueError if the model ties its head to its embedding and the checkpoint has another head."""
    if HEAD not in directory.shapes or any(each.theirs == (HEAD,) for each in maps):
        return
    embedding = (
        family.embedding if family.embedding in directory.shapes else family.embedding.removeprefix(family.prefix)
    )
    if directory.shapes[HEAD] != directory.shapes[embedding] or not torch.equal(
        directory.read(HEAD), directory.read(embedding)
    ):
        raise ValueError(
            f"{directory.folder}: {HEAD} is not the embedding, and with model.tie_embeddings=true the model would lose "
            "it; take model.tie_embeddings=false"
        )


def copy_tensors(
    each: TensorMap, state: Mapping[str, Tensor], directory: CheckpointDirectory, into: Parts | None
) -> None:
    """Copy the tensors of a map into those of ``state``, or ``into`` the parts of a rank."""
    if into is not None and each.ours and not any(map(into.holds, each.ours)):
        return
    sources = [directory.read(name) for name in each.theirs]
    if not each.ours:
        if sources[0].any():
            raise ValueError(
                f"{directory.folder}: {each.theirs[0]} is not 0, and the model has no such bias; model=auto has"
            )
        return
    whole = sources[0] if len(sources) == 1 else torch.cat(sources)
    whole = whole.T if each.transposed else whole
    row = 0
    for name in each.ours:
        target = state[name]
        source = whole[row : row + len(target)]
        if into is None:
            target.copy_(source)
        else:
            into.put(name, source)
        row += len(target)


def describe_differences(model: LanguageModel, maps: Iterable[TensorMap], directory: CheckpointDirectory) -> list[str]:
    """Remarks for the user on weights that are used differently from the checkpoint."""
    found = []
    head: Any = next((each for each in maps if each.ours == ("head.weight",)), None)
    if head is not None and head.theirs != (HEAD,):
        found.append("its head is tied to the embedding, the model's is not: it starts as a copy")
    for each in maps:
        if each.may_be_longer and directory.shapes[each.theirs[0]][0] > model.context_length:
            positions = directory.shapes[each.theirs[0]][0]
            found.append(f"of its {positions} positions the first {model.context_length} are used")
    return found
