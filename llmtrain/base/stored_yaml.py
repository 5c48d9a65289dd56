"""YAML files of a run, read as plain data: nothing in them is constructed, no key is lost, their size is bounded."""

from pathlib import Path
from typing import Any

import yaml

from llmtrain.base.stored_files import MAX_INTEGER, StoredFileError, check_depth, read_text_file

MAX_BYTES = 2 << 20  # a run's config has some kilobytes


class _Loader(yaml.SafeLoader):
    """Plain data; a key that occurs twice is an error instead of a value that is lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file of a run.  Raises :class:`StoredFileError`, naming the file, for anything else."""
    try:
        values = _Loader(read_text_file(path, MAX_BYTES)).get_single_data()
        check_depth(values)
        _check_scalars(values)
    except OSError as error:
        raise StoredFileError(f"{path}: {error.strerror}") from error
    except StoredFileError:
        raise
    except RecursionError as error:
        raise StoredFileError(f"{path}: not a config (nested too deeply)") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:  # of its dates
        raise StoredFileError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise StoredFileError(f"{path}: not a run's config (a mapping of keys is needed)")
    return values


def _check_scalars(value: Any) -> None:
    """Raise ValueError for values that YAML knows and a config of ours does not hold: dates, sets, bytes."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_scalars(item)
    elif type(value) is int and abs(value) >= MAX_INTEGER:
        raise ValueError("a number of more than 64 bits")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"a value of the kind {type(value).__name__}; a text needs quotes")
