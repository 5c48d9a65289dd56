"""The boundary between Hydra and the program: composes configs and resolves them to plain values."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from llmtrain.config.auto_model import find_model, find_tokenizer
from llmtrain.config.folders import conf_dir, sample
from llmtrain.config.stored_config import REDACTED, SECRET, ConfigError, escape

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}

OmegaConf.register_new_resolver("sample", sample, replace=True)


def compose(verb: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> dict[str, Any]:
    """Compose ``conf/<verb>.yaml`` with Hydra's overrides; the result is plain and resolved.

    Raises Hydra's and OmegaConf's own errors, as the command line does, and :class:`ConfigError`.
    """
    extra = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with _fresh_hydra(), hydra.initialize_config_dir(str(conf_dir()), job_name="llmtrain", **VERSION_BASE):
        config = hydra.compose(verb, [*overrides, *extra], return_hydra_config=True)
        choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        return resolve(config, choices)


@contextmanager
def _fresh_hydra() -> Iterator[None]:
    """Hydra's global state set aside, so that composing works inside of another Hydra program."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = before


def resolve(config: DictConfig, choices: Mapping[str, Any]) -> dict[str, Any]:
    """A composed config as plain values; ``name`` defaults to the chosen recipe's or model's."""
    if "name" in config and config["name"] is None:
        config["name"] = choices.get("experiment") or choices.get("model") or "run"
    find_model(config)
    find_tokenizer(config)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        raise ConfigError(f"{key}: a value is required; give it as {key}=…") from error
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check_secrets(OmegaConf.to_container(config, resolve=False))
    return plain


def _check_secrets(value: Any, key: str = "") -> None:
    """Refuse a secret of the environment in a key that would be stored, and a secret that was not stored."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_secrets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            _check_secrets(item, key)
    elif isinstance(value, str):
        names = [name.strip() for name in re.findall(r"\$\{\s*oc\.env:([^,}]+)", value)]
        if any(SECRET.search(name) for name in names) and not SECRET.search(key):
            raise ConfigError(f"{key}={value}: a secret, and config.yaml would hold it; only keys named like *_key, "
                              "*_token, *_secret or *_password are kept out")  # fmt: skip
        if value == REDACTED:
            raise ConfigError(f"{key}: it is a secret and was not stored; give it again: {key}=…")


def register_stored(config: Mapping[str, Any]) -> None:
    """Make a stored config the primary config ``resume``, every group an option named ``stored``.

    So ``resume RUN_DIR optimizer.lr=1e-4`` changes a value and ``resume RUN_DIR schedule=constant`` an option, with
    Hydra's own grammar.
    """
    store = ConfigStore.instance()
    groups = {key: value for key, value in config.items() if isinstance(value, dict) and "_target_" in value}
    for group, node in groups.items():
        store.store(group=group, name="stored", node=escape(node))
    values = {key: escape(value) for key, value in config.items() if key not in groups}
    defaults = [*({group: "stored"} for group in groups), "_self_"]
    store.store(name="resume", node={"defaults": defaults, **values})


def shown(config: DictConfig) -> dict[str, Any]:
    """The values of a composed config; for one that refers to a missing value, the reference."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    for key in values:
        if isinstance(values[key], dict):
            values[key] = shown(config[key])
            continue
        with suppress(OmegaConfBaseException):
            value = OmegaConf.select(config, key, throw_on_missing=False)
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return values


def folders() -> list[Path]:
    """The folders of config groups that Hydra looks into, those of the user among them."""
    found = [entry.path.removeprefix("file://") for entry in _loader().get_search_path().get_path()]
    return [Path(path) for path in found if "://" not in path]


def options(group: str) -> list[str]:
    """The options of ``group``, in all of :func:`folders`."""
    return _loader().get_group_options(group)


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()
