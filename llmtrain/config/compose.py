"""The boundary between Hydra and the program: composes configs and resolves them to plain values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from omegaconf.resolvers import oc

from llmtrain.config.auto_model import find_model, find_tokenizer
from llmtrain.config.deepspeed_file import read_deepspeed
from llmtrain.config.folders import conf_dir, sample
from llmtrain.config.overrides import search_path
from llmtrain.config.secret_values import REDACTED, is_secret
from llmtrain.config.stored_config import ConfigError, escape, flatten
from llmtrain.config.texts import as_typed
from llmtrain.config.texts import shown as shown_quoted

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}

REQUIRED = {  # keys without a default, and what to say where they are not given
    "to": "name the directory to write, as in: llmtrain export RUN to=my-model",
    "data.path": "a value is required: a file or a folder, as in data.path=my-text",
}

OmegaConf.register_new_resolver("sample", sample, replace=True)


def compose(verb: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> dict[str, Any]:
    """Compose ``conf/<verb>.yaml`` with Hydra's overrides; the result is plain and resolved.

    Raises Hydra's and OmegaConf's own errors, as the command line does, and :class:`ConfigError`.
    """
    extra = [] if config_dir is None else [search_path(config_dir)]
    with _fresh_hydra(), hydra.initialize_config_dir(str(conf_dir()), job_name="llmtrain", **VERSION_BASE):
        config = hydra.compose(verb, [*as_typed(verb, overrides), *extra], return_hydra_config=True)
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
    try:
        if "name" in config and config["name"] is None:
            config["name"] = choices.get("experiment") or choices.get("model") or "run"
        find_model(config)
        find_tokenizer(config)
        read_deepspeed(config)
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        raise ConfigError(f"{key}: {REQUIRED.get(key, f'a value is required; give it as {key}=…')}") from error
    except InterpolationResolutionError as error:
        key, reason = error.full_key or "", str(error).splitlines()[0]
        written = as_written(config).get(key)
        text = f"; if it is no reference but the text itself: {shown_quoted(key, written)}" if written else ""
        raise ConfigError(f"{key}={written}: {reason}{text}") from error
    _check_secrets(config, plain)
    return plain


def as_written(config: DictConfig) -> dict[str, Any]:
    """The values of a composed config by their dotted keys, references as they were written."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    return flatten(values)


def _check_secrets(config: DictConfig, plain: Mapping[str, Any]) -> None:
    """Refuse a secret in a key that would be stored, and a secret that was not stored.

    A secret is a variable of the environment, or another key, with the name of one, however it is referred to.
    """
    values = flatten(plain)
    secrets = [value for key, value in values.items() if is_secret(key) and isinstance(value, str) and value]
    for key, written in as_written(config).items():
        for item in written if isinstance(written, list) else [written]:
            if not isinstance(item, str) or is_secret(key):
                continue
            names = variables_read(config, item) if "${" in item else set()
            shown = str(values.get(key))
            if any(map(is_secret, names)) or ("${" in item and any(secret in shown for secret in secrets)):
                raise ConfigError(f"{key}={item}: a secret, and config.yaml would hold it; only keys named like *_key, "
                                  "*_token, *_secret or *_password are kept out")  # fmt: skip
    for key, value in values.items():
        if isinstance(value, str) and REDACTED in value:
            raise ConfigError(f"{key}: it is a secret and was not stored; give it again: {key}=…")


_READ: ContextVar[set[str] | None] = ContextVar("read", default=None)  # variables of the environment


def _env(name: str, *default: Any) -> Any:
    """OmegaConf's ``oc.env``, which records the variables that are read."""
    if (read := _READ.get()) is not None:
        read.add(name)
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _env, replace=True)


def variables_read(config: DictConfig, text: str) -> set[str]:
    """The variables of the environment that are read to resolve ``text``, in whatever form it refers to them."""
    token = _READ.set(set())
    try:
        node = StringNode(text)
        node._set_parent(config)
        with suppress(OmegaConfBaseException):  # reported when the whole is resolved
            node._dereference_node()
        return _READ.get() or set()
    finally:
        _READ.reset(token)


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
