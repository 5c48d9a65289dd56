"""DeepSpeed's JSON, read when a config is composed: a run directory travels without the file."""

from omegaconf import DictConfig, OmegaConf

from llmtrain.config.stored_config import ConfigError, escape

DEEPSPEED = "llmtrain.distributed.deepspeed.DeepSpeed"


def read_deepspeed(config: DictConfig) -> None:
    """Put the content of the file that ``distributed.config`` names in the place of its name."""
    if OmegaConf.select(config, "distributed._target_") != DEEPSPEED:
        return
    named = OmegaConf.select(config, "distributed.config")
    if not isinstance(named, str) or named.lstrip().startswith("{"):
        return
    from llmtrain.distributed.deepspeed import read_config

    try:
        config["distributed"]["config"] = escape(read_config(named))
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error
