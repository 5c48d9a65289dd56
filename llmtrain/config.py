"""The door between Hydra and the program: a composed config comes in, checked dataclasses go on.

A node's ``_target_`` names a frozen dataclass of ours.  The node is merged into that dataclass' schema, so every key
and type is checked and errors name ``group.key``.  ``hydra.utils.instantiate`` is never called: it runs whatever a
config names, and run directories travel.
"""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from llmtrain.checks import did_you_mean, where
from llmtrain.stored_config import REDACTED, SECRET, ConfigError, load, to_plain, untrusted

T = TypeVar("T")

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__ < "1.4" else {}
NOT_RUN_KEYS = ("run_dir", "output_dir", "plugins")  # where and with what code, not what
AUTO = "llmtrain.hf.auto.Auto"  # stands for the model that it finds
RUN_WEIGHTS = "llmtrain.weights.checkpoint.Checkpoint"
ALIASES = {"gpu": "cuda"}  # what people call a value that has another name here
SAME_AS_CONTEXT = "${model.context_length}"


def conf_dir() -> Path:
    """The directory of the config groups."""
    return _installed("conf", "conf")


def sample(name: str) -> str:
    """The path of a file of the sample data, as recipes name it: ``${sample:messages.csv}``."""
    return str(_installed("samples", "data") / name)


OmegaConf.register_new_resolver("sample", sample, replace=True)


def _installed(package: str, folder: str) -> Path:
    """A directory that is installed with the package, or lies beside it in a checkout."""
    try:
        return Path(next(iter(importlib.import_module(f"llmtrain.{package}").__path__))).resolve()
    except ModuleNotFoundError:
        return Path(__file__).resolve().parent.parent / folder


# --- composing ---------------------------------------------------------------------------------------------------


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
    _find_model(config)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        raise ConfigError(f"{key}: a value is required; give it as {key}=…") from error
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check_secrets(OmegaConf.to_container(config, resolve=False))
    return plain


def _find_model(config: DictConfig) -> None:
    """Put the model that ``model=auto`` finds in its place, before other keys refer to it."""
    if "model" not in config or OmegaConf.select(config, "model._target_") != AUTO:
        return
    try:
        values = OmegaConf.to_container(config["model"], resolve=True, throw_on_missing=True)
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        raise ConfigError(
            "weights.path: model=auto needs a checkpoint to look at; give a run of this program, weights=checkpoint "
            "weights.path=RUN_DIR, or published weights, weights=huggingface weights.path=DIR"
        ) from error
    with naming("model"):
        stand_in: Any = build(values, object, path="model")  # type: ignore[arg-type]
        path = Path(stand_in.path).expanduser()
        if OmegaConf.select(config, "weights._target_") == RUN_WEIGHTS and not (path / "config.yaml").is_file():
            is_weights = stand_in.path == OmegaConf.select(config, "weights.path")
            key, what = "weights.path" if is_weights else "model.path", "a run or checkpoint of this program"
            there = "it has no config.yaml" if path.exists() else f"no such directory{where(stand_in.path)}"
            raise ConfigError(f"{key}={stand_in.path}: {there}; weights=checkpoint takes {what}")
        model = stand_in.adapted(_model_of_run(path)) if (path / "config.yaml").is_file() else stand_in.resolved()
    config["model"] = _escape(to_plain(model))
    data = OmegaConf.to_container(config["data"], resolve=False)
    if isinstance(data, dict) and data.get("sequence_length") == SAME_AS_CONTEXT:
        config["data"]["sequence_length"] = stand_in.sequence_length(model.context_length)


def _model_of_run(path: Path) -> Any:
    """The model's config that a run or checkpoint of this program stores."""
    stored = load(path / "config.yaml")
    plugins = [name for name in stored.get("plugins") or [] if name]
    if not isinstance(stored.get("model"), Mapping):
        raise ConfigError(f"{path / 'config.yaml'}: says nothing of a model")
    try:
        return build(stored["model"], object, path="model")
    except ConfigError as error:
        if plugins:
            raise ConfigError(f"{error}; name its model with model=…, as that run did") from error
        raise


def _check_secrets(value: Any, key: str = "") -> None:
    """Refuse a secret of the environment in a key that would be stored, and one that was not stored."""
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
        store.store(group=group, name="stored", node=_escape(node))
    values = {key: _escape(value) for key, value in config.items() if key not in groups}
    defaults = [*({group: "stored"} for group in groups), "_self_"]
    store.store(name="resume", node={"defaults": defaults, **values})


# --- for help ----------------------------------------------------------------------------------------------------


def shown(config: DictConfig) -> dict[str, Any]:
    """The values of a composed config; of those that refer to what is not given yet, the reference."""
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


# --- building ----------------------------------------------------------------------------------------------------


def build(node: Mapping[str, Any], base: type[T], *, path: str = "", plugins: Sequence[str] = ()) -> T:
    """Build the dataclass that ``node["_target_"]`` names, a ``base``, with everything below it.

    ``node`` is plain and resolved.  ``path`` is the dotted key of the node, for messages.  Targets outside of this
    package and of ``plugins`` are refused, and so is anything but a dataclass defined there.
    """
    cls: Any = _find_class(node.get("_target_"), base, path, plugins)
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    dotted = f"{path}." if path else ""
    _check_keys(node, [*names, "_target_"], dotted)
    required = [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory]
    if missing := [name for name in required if name not in node]:
        raise ConfigError(f"{dotted}{missing[0]}: missing; {cls.__name__} needs it")
    parts = {name: hints[name] for name in names if _is_component(hints[name])}
    values: dict[str, Any] = {
        name: _build_part(node[name], hint, f"{dotted}{name}", plugins) for name, hint in parts.items() if name in node
    }
    plain = {key: value for key, value in node.items() if key in names and key not in parts}
    for name, value in plain.items():
        for element in get_args(hints[name]):  # list[Rule] and the like
            if dataclasses.is_dataclass(element) and isinstance(value, list):
                for index, item in enumerate(value):
                    known = [field.name for field in dataclasses.fields(element)]
                    _check_keys(item if isinstance(item, Mapping) else {}, known, f"{dotted}{name}[{index}].")
    values |= _check_types({name: hints[name] for name in plain}, plain, dotted)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{dotted}{error}") from error


def _check_keys(node: Mapping[str, Any], known: Sequence[str], dotted: str) -> None:
    for key in node:
        if key not in known:
            names = [name for name in known if name != "_target_"]
            raise ConfigError(f"{dotted}{key}: no such key{suggest(str(key), names, dotted)}")


@contextmanager
def naming(group: str) -> Iterator[None]:
    """Put ``group.`` before an error that starts with a bare key, as a component's own checks make them."""
    try:
        yield
    except ValueError as error:
        key = re.match(rf"(?!{group}\b)(\w+)(\[\d+\])?(\.\w+)?=", str(error))
        if key and not (key[3] and (conf_dir() / key[1]).is_dir()):  # another group's has its name already
            raise ConfigError(f"{group}.{error}") from error
        raise


def _build_part(node: Any, base: type, path: str, plugins: Sequence[str]) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{path}={node!r}: an option of this group is needed, with its _target_")
    return build(node, base, path=path, plugins=plugins)


def _is_component(hint: Any) -> bool:
    return isinstance(hint, type) and (inspect.isabstract(hint) or dataclasses.is_dataclass(hint))


def _find_class(target: Any, base: type[T], path: str, plugins: Sequence[str]) -> type[T]:
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{path or 'config'}._target_={target!r}: must name a dataclass, as in package.module.Class")
    allowed = ("llmtrain", *plugins)
    if target.split(".")[0] not in allowed:
        raise ConfigError(
            f"{path or 'config'}._target_={target}: not a class of llmtrain; "
            f"if you trust it, name its package: plugins=[{target.split('.')[0]}]"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):  # it exists, and needs something that does not
            raise
        raise ConfigError(f"{path or 'config'}._target_={target}: there is no module {module_name}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module_name):
        raise ConfigError(f"{path or 'config'}._target_={target}: not a dataclass defined in {module_name}")
    if not issubclass(cls, base):
        raise ConfigError(
            f"{path or 'config'}._target_={target}: not a {base.__module__}.{base.__name__}, which this place needs"
        )
    return cls


def _check_types(hints: Mapping[str, Any], values: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    """``values`` converted to their annotated types."""
    schema = dataclasses.make_dataclass("Schema", [(name, hint, dataclasses.MISSING) for name, hint in hints.items()])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), _escape(dict(values)))
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
        top = re.split(r"[.\[]", str(key))[0]
        wanted = _wanted(f"{dotted}{key}", hints[key], values[key]) if key in values else None
        reason = wanted or str(error).splitlines()[0]
        shown = f"={values[top]!r}" if top in values else ""
        raise ConfigError(f"{dotted}{key}{shown}: {reason}") from error
    except ValueError as error:  # a nested dataclass' own check
        raise ConfigError(f"{dotted.rstrip('.')}: {error}" if dotted else str(error)) from error
    return {name: getattr(built, name) for name in hints}


def _wanted(key: str, hint: Any, value: Any) -> str | None:
    """What a value of the type ``hint`` has to be, in words; None where there are none better than the library's."""
    alternatives = [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
    (kind, *others) = alternatives
    if others:
        return None
    if get_origin(kind) is list:
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else ["…"]
        words = f"must be a list, in brackets: '{key}=[{','.join(items)}]'"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        names = [item.name for item in kind]
        words = f"must be one of {', '.join(names)}{did_you_mean(ALIASES.get(str(value), str(value)), names)}"
    else:
        words = {bool: "must be true or false", int: "must be a whole number", str: "must be a text",
                 float: "must be a number, as in 0.1 or 3e-4"}.get(kind, "")  # fmt: skip
    return words and words + "; or null" * (len(get_args(hint)) > 1 and kind is not hint)


def suggest(key: str, known: Sequence[str], dotted: str = "") -> str:
    """What to append to "no such key": the nearest name, or all of them."""
    if nearest := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"; did you mean {dotted}{nearest[0]}?"
    return f"; there are: {', '.join(known)}" if known else ""


# --- what is stored ----------------------------------------------------------------------------------------------


def load_run(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """The stored config that going on from ``step`` (None: the newest checkpoint) of a run starts from.

    It may name classes of a plugin; whoever resumes the run has to name the plugin again.  Where the run was made is
    left out: it may have been moved.
    """
    from llmtrain.run_directory import RunDirectory  # imports torch
    from llmtrain.storage import verify_checkpoint

    directory = RunDirectory.open(run_dir)
    path = directory.config_at(step)
    if path != directory.config:
        verify_checkpoint(path.parent, only=path.name)
    return complete(untrusted(load(path))) | {"run_dir": None}


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """``stored`` with what it lacks since an older version wrote it, as today's defaults have it.

    A group comes from ``conf/train.yaml``, a key of an option from the YAML of that option.  Where several YAMLs name
    its class and do not agree (the sizes of a model), the key stays missing: :func:`build` names it.
    """
    values = dict(stored)
    for group, node in stored.items():
        if isinstance(node, Mapping) and "_target_" in node:
            values[group] = {**node, **_defaults_for(group, node, stored)}
    path = conf_dir() / "train.yaml"
    train: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    groups = [group for entry in train.get("defaults", []) if isinstance(entry, dict) for group, name in entry.items()
              if name is not None]  # fmt: skip
    if missing := [key for key in (*groups, *train) if key not in values and key not in ("defaults", "_target_")]:
        defaults = compose("train", [])
        values |= {key: defaults[key] for key in missing}
    return values


def _defaults_for(group: str, node: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ``node`` lacks, from the YAMLs of its group that name its class."""
    found: dict[str, list[Any]] = {}
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        if str(node["_target_"]) not in path.read_text(encoding="utf-8"):  # spares reading YAML, which is slow
            continue
        option: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if option.get("_target_") == node["_target_"]:
            for key in option.keys() - node.keys() - {"defaults"}:
                found.setdefault(key, []).append(option[key])
    agreed = {key: options[0] for key, options in found.items() if all(value == options[0] for value in options)}
    if not agreed:
        return {}
    whole = OmegaConf.create({**_escape(stored), group: {**_escape(node), **agreed}})
    resolved: Any = OmegaConf.to_container(whole, resolve=True)
    return {key: resolved[group][key] for key in agreed}


def _escape(value: Any) -> Any:
    """Resolved values for OmegaConf: a literal ``${`` stays literal."""
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):  # backslashes before it would escape ours
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    return value
