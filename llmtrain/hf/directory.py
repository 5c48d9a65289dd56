"""A checkpoint directory: find it, list its tensors, and read them one at a time."""

import hashlib
import json
import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.base.checks import needing_package, where
from llmtrain.hf import BUFFERS
from llmtrain.hf.config_json import ConfigJson

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
SAMPLES, SAMPLE = 64, 1 << 16  # blocks of a file that a fingerprint reads, and bytes of each


class TensorLocation(NamedTuple):
    """The place of a tensor in a file."""

    file: BinaryIO
    start: int  # bytes from the beginning of the file
    size: int
    dtype: torch.dtype


class CheckpointDirectory:
    """A checkpoint directory to read from; a context manager, since its files are held open.

    Files are read, not mapped into memory: a tensor that has been copied into a model takes no more memory, and a file
    that is cut meanwhile raises an error instead of crashing the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ConfigJson.read(folder)
        self.files = find_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, TensorLocation] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Open every file and read its list of tensors.  Raises ValueError, naming the file, for a damaged one."""
        try:
            for file in self.files:
                self._open(file)
            self._check_index()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._stack.close()

    def _open(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening checks the header and the size of the file
            opened = self._stack.enter_context(file.open("rb"))
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file}: cut or damaged ({error}); get it again") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if BUFFERS.fullmatch(name):
                continue  # follows from the configuration
            if entry["dtype"] not in FLOATS:
                raise ValueError(
                    f"{file}: {name} is {entry['dtype']}, not a floating-point type of 16 bits or more; quantised "
                    "weights cannot be trained, take the checkpoint that they were quantised from"
                )
            if name in self._where:
                raise ValueError(f"{file}: {name} is in another file of the directory too")
            start, end = entry["data_offsets"]
            self.shapes[name] = tuple(entry["shape"])
            self._where[name] = TensorLocation(opened, 8 + length + start, end - start, FLOATS[entry["dtype"]])

    def _check_index(self) -> None:
        if self.files[0].name != SINGLE:
            names = read_index(self.folder / INDEX)
            absent = [name for name in names if name not in self.shapes and not BUFFERS.fullmatch(name)]
            if absent:
                raise ValueError(f"{self.folder / INDEX}: lists {absent[0]}, which is in no file of the directory")

    def read(self, name: str) -> Tensor:
        """A tensor on the host, in its stored type.  Raises ValueError, naming it, if it cannot be read."""
        file, start, size, dtype = self._where[name]
        tensor = torch.empty(self.shapes[name], dtype=dtype)
        try:
            file.seek(start)
            found = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(f"{file.name}: {name} cannot be read ({error.strerror})") from error
        if found != size:
            raise ValueError(f"{file.name}: {name} cannot be read, the file was cut meanwhile")
        return tensor


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a directory.  Raises ValueError, with the remedy, if there are none."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(read_index(folder / INDEX).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{folder / missing[0]}{more}: missing; {INDEX} lists {len(names)} files")
        return [folder / name for name in names]
    found = sorted(path for kind in PICKLES for path in folder.glob(kind) if path.name != "training_args.bin")
    if found:
        raise ValueError(
            f"{found[0]}: a pickle, which can run any code when it is loaded, so it is not loaded; if you trust it, "
            'convert it with transformers: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors', safe_serialization=True)\""
        )
    raise ValueError(f"{folder}: it holds neither {SINGLE} nor {INDEX}")


def read_index(file: Path) -> dict[str, str]:
    """The file that each tensor is in.  Raises ValueError, naming the index."""
    try:
        names = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cut or damaged: not a map of tensors to files ({error})") from error
    if not names:
        raise ValueError(f"{file}: lists no tensor")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file}: {name!r} is not the name of a safetensors file beside it")
    return names


def fingerprint(folder: Path) -> str:
    """A hash that changes with the weights: sha256 over names, sizes and sampled bytes of the files.

    Of a file of up to 4 MiB all bytes count; of a larger one 64 blocks of 64 KiB, evenly spaced, including the first
    and the last bytes.  Training, or rounding to another type, changes weights everywhere.
    """
    digest = hashlib.sha256()
    for file in find_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            if size <= SAMPLES * SAMPLE:
                digest.update(opened.read())
                continue
            for index in range(SAMPLES):
                opened.seek((size - SAMPLE) * index // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def locate_directory(path: str) -> Path:
    """The directory ``path``, or the downloaded model ``org/name`` or ``org/name@revision`` of the hub.

    Raises ValueError if there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"weights.path={path}: a file; give its directory")
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", path)
    if match is None:
        raise ValueError(
            f"weights.path={path}: no such directory{where(path)}, and no name of a model on the hub either, as "
            "org/name is (openai-community/gpt2); give the directory of a copy, as save_pretrained writes it, or, "
            "with a network and pip install 'llmtrain[huggingface]', the name on the hub"
        )
    return download(match[1], match[2], path)


@cache
def download(name: str, revision: str | None, path: str) -> Path:
    """Download a model of the hub and return its directory.  Only data files: never a pickle or a program."""
    remedy = "to get a model from the hub: pip install 'llmtrain[huggingface]'"
    with needing_package(f"weights.path={path}: no such directory; {remedy}"):
        import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # of the network, the hub or the disk, without a common base class
        reason = " ".join(str(error).split())
        raise ValueError(
            f"weights.path={path}: no such directory, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}: {reason[:200]}); without a network, give the directory of a copy"
        ) from error


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
