"""The model and the tokenizer that ``model=auto`` and ``tokenizer=auto`` stand for, found when a config is composed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from llmtrain.base.checks import where
from llmtrain.base.run_files import CONFIG
from llmtrain.config.build import build, naming
from llmtrain.config.folders import conf_dir
from llmtrain.config.stored_config import FORMER, ConfigError, escape, load, to_plain

AUTO = "llmtrain.hf.auto.AutoModel"  # stands for the model that it finds
AUTO_TOKENIZER = "llmtrain.hf.auto.AutoTokenizer"
WEIGHTS = "llmtrain.weights.huggingface.HuggingFace"
RUN_WEIGHTS = "llmtrain.weights.checkpoint.Checkpoint"
SAME_AS_CONTEXT = "${model.context_length}"


def find_model(config: DictConfig) -> None:
    """Replace ``model=auto`` by the model that it finds, before other keys refer to it."""
    if "model" not in config or OmegaConf.select(config, "model._target_") != AUTO:
        return
    try:
        values = OmegaConf.to_container(config["model"], resolve=True, throw_on_missing=True)
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        raise ConfigError(
            "weights.path: model=auto needs a checkpoint to read; give a run of this program, weights=checkpoint "
            "weights.path=RUN_DIR, or published weights, weights=huggingface weights.path=DIR"
        ) from error
    with naming("model"):
        stand_in: Any = build(values, object, path="model")  # type: ignore[arg-type]
        path = Path(stand_in.path).expanduser()
        if OmegaConf.select(config, "weights._target_") == RUN_WEIGHTS and not (path / CONFIG).is_file():
            is_weights = stand_in.path == OmegaConf.select(config, "weights.path")
            key, what = "weights.path" if is_weights else "model.path", "a run or checkpoint of this program"
            there = "it has no config.yaml" if path.exists() else f"no such directory{where(stand_in.path)}"
            raise ConfigError(f"{key}={stand_in.path}: {there}; weights=checkpoint takes {what}")
        model = stand_in.adapted(_model_of_run(path)) if (path / CONFIG).is_file() else stand_in.resolved()
    config["model"] = escape(to_plain(model))
    data = OmegaConf.to_container(config["data"], resolve=False)
    if isinstance(data, dict) and data.get("sequence_length") == SAME_AS_CONTEXT:
        config["data"]["sequence_length"] = stand_in.sequence_length(model.context_length)


def find_tokenizer(config: DictConfig) -> None:
    """Replace ``tokenizer=auto`` by the tokenizer of the weights, or by ``gpt2`` where they bring none."""
    if "tokenizer" not in config or OmegaConf.select(config, "tokenizer._target_") != AUTO_TOKENIZER:
        return
    source, found = OmegaConf.select(config, "weights._target_"), None
    if source in (WEIGHTS, RUN_WEIGHTS):
        path = OmegaConf.select(config, "weights.path", throw_on_missing=False)
        if isinstance(path, str):
            found = _tokenizer_of_run(Path(path).expanduser()) if source == RUN_WEIGHTS else _tokenizer_beside(path)
    config["tokenizer"] = escape(found or _option("gpt2"))


def _tokenizer_of_run(path: Path) -> dict[str, Any] | None:
    if not (path / CONFIG).is_file():
        return None
    stored = load(path / CONFIG).get("tokenizer")
    return {**FORMER.get(str(stored.get("_target_")), {}), **stored} if isinstance(stored, Mapping) else None


def _tokenizer_beside(path: str) -> dict[str, Any] | None:
    from llmtrain.hf.auto import find_tokenizer_option  # imports torch, which --cfg job does not need
    from llmtrain.hf.directory import locate_directory

    option = find_tokenizer_option(path)
    return None if option is None else _option(option) | {"path": str(locate_directory(path))}


def _option(name: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "tokenizer" / f"{name}.yaml"), resolve=False)
    return values


def _model_of_run(path: Path) -> Any:
    """The model's config that a run or checkpoint of this program stores."""
    stored = load(path / CONFIG)
    plugins = stored.get("plugins")  # that it names itself; none of them is imported
    if not isinstance(stored.get("model"), Mapping):
        raise ConfigError(f"{path / 'config.yaml'}: has no model")
    try:
        return build(stored["model"], object, path="model")
    except ConfigError as error:
        if plugins:
            raise ConfigError(f"{error}; name its model with model=…, as that run did") from error
        raise
