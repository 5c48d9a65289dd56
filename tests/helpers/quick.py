"""The libraries that take most of a short command's time, quick: Hydra composes the same configs in half the time.

Hydra parses every YAML file anew each time, and composes each command's config twice: first to see whether it sets
``hydra.mode``.  A run's plot takes as long as some steps of training: it is made, and saved as a single pixel except in
tests with the fixture ``drawn_plots``.  Processes that tests start by ``python -m llmtrain`` have the libraries as they
are.
"""

import os
import pickle
from collections.abc import Callable
from typing import Any

from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf
from PIL import Image

_load = ConfigRepository.load_config
_get_mode = Hydra.get_mode
_print_png = FigureCanvasAgg.print_png
_read = OmegaConf.load
_create_map: Callable[..., Any] = defaults_list._create_interpolation_map
_pickled: dict[tuple[Any, ...], bytes] = {}


def install() -> None:
    """Make the libraries of this process quick."""
    ConfigRepository.load_config = load_config
    Hydra.get_mode = get_mode
    defaults_list._create_interpolation_map = create_interpolation_map
    FigureCanvasAgg.print_png = lambda self, file, **options: Image.new("RGB", (1, 1)).save(file, "png")
    OmegaConf.load = staticmethod(load)


def load_config(self: Any, config_path: str) -> Any:
    """Read a config that was read before from memory, unless its file has changed."""
    version = version_of(self._find_object_source(config_path, ObjectType.CONFIG), config_path)
    if version not in _pickled:
        loaded = _load(self, config_path)
        if version is None or loaded is None:
            return loaded
        _pickled[version] = pickle.dumps(loaded)
    return pickle.loads(_pickled[version])


def load(file: Any) -> Any:
    """Read a YAML file that was read before from memory, unless it has changed."""
    if not isinstance(file, str | os.PathLike):
        return _read(file)
    found = os.stat(file)  # noqa: PTH116
    version = (os.path.realpath(file), found.st_ino, found.st_size, found.st_mtime_ns)
    if version not in _pickled:
        _pickled[version] = pickle.dumps(_read(file))
    return pickle.loads(_pickled[version])


def version_of(source: Any, config_path: str) -> tuple[Any, ...] | None:
    """The place and version of a config: another version of it has another one.  None: it may change unseen."""
    place = (type(source), getattr(source, "provider", None), getattr(source, "path", None), config_path)
    if source is not None and source.scheme() == "file":
        file = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))  # noqa: PTH116, PTH118
        return (*place, file.st_ino, file.st_size, file.st_mtime_ns)
    return place if source is not None and config_path.startswith("hydra/") else None


def get_mode(self: Any, config_name: str | None, overrides: list[str]) -> Any:
    """The ``hydra.mode`` of a config: nothing sets it but an override, or a file of a folder besides conf/."""
    of_hydra = [override for override in overrides if override.lstrip("+~").startswith("hydra")]
    ours = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra.sweep.dir=", "hydra.sweep.subdir=.",
            "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.name=llmtrain")  # fmt: skip
    providers = {entry.provider for entry in self.config_loader.get_search_path().get_path()}
    if all(override.startswith(ours) for override in of_hydra) and providers <= {"hydra", "main", "schema"}:
        return None
    return _get_mode(self, config_name, overrides)


def create_interpolation_map(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """The choices that a defaults list may refer to; empty where it refers to none."""
    if any(default.is_interpolation() for default in defaults):
        return _create_map(overrides, defaults, self_added)
    return OmegaConf.create()
