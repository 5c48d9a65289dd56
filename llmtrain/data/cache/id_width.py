"""The type of the ids in raw token files, which do not name it: from files beside them, or from the ids themselves."""

import json
from enum import Enum
from pathlib import Path

import numpy as np

MEGATRON_MAGIC = b"MMIDIDX\0\0"
# Codes of Megatron-LM's index (megatron/core/datasets/indexed_dataset.py, DType).
MEGATRON_DTYPES = {1: "|u1", 3: "<u2", 4: "<u4", 5: "<u8", 8: "<u2"}
META = ("meta.json", "metadata.json")  # beside the file, with a key dtype
SAMPLE = 1 << 16  # bytes looked at, at the beginning, in the middle and at the end
FEWEST = 64  # ids from which a type can be told
MOST_UPPER = 32  # upper halves are below it in any vocabulary, up to 2 million


class TokenType(Enum):
    """The type of the ids in a raw token file, little-endian."""

    auto = "from a file beside it (X.idx, meta.json), else from the ids"
    uint8 = "|u1"
    uint16 = "<u2"
    int16 = "<i2"
    uint32 = "<u4"
    int32 = "<i4"
    int64 = "<i8"

    @property
    def dtype(self) -> str:
        """NumPy's name of the type, unsigned: a negative id becomes one beyond any vocabulary."""
        return self.value.replace("i", "u")


def type_beside(path: Path, size: int) -> str | None:
    """The type that a file beside ``path`` names: Megatron's index, or a ``meta.json``; None if there is none.

    Raises ValueError for an index that does not fit the ``size`` of the file, and for types that hold no ids.
    """
    index = path.with_suffix(".idx")
    if index.is_file():
        return _type_of_megatron(index, path, size)
    for name in META:
        beside = path.with_name(name)
        if beside.is_file():
            try:
                stored = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue  # of some other kind
            named = stored.get("dtype") if isinstance(stored, dict) else None
            if named is None:
                continue
            if named not in TokenType.__members__ or named == "auto":
                known = ", ".join(name for name in TokenType.__members__ if name != "auto")
                raise ValueError(f"{beside}: dtype {named!r}: ids are {known}; name it with data.dtype=…")
            return TokenType[named].dtype
    return None


def _type_of_megatron(index: Path, path: Path, size: int) -> str:
    with index.open("rb") as file:
        head = file.read(34)
        if not head.startswith(MEGATRON_MAGIC) or len(head) < 34:
            raise ValueError(f"{index}: not an index of Megatron-LM; move it away, or name data.dtype=…")
        code, sequences = head[17], int.from_bytes(head[18:26], "little")
        dtype = MEGATRON_DTYPES.get(code)
        if dtype is None:
            raise ValueError(f"{index}: names type {code}, which holds no ids; prepare the file again")
        if index.stat().st_size < 34 + 4 * sequences:
            raise ValueError(f"{index}: cut: it names {sequences:,} sequences; restore it from a copy")
        tokens = int(np.fromfile(file, "<i4", sequences).sum(dtype=np.int64))
    if tokens * np.dtype(dtype).itemsize != size:
        raise ValueError(
            f"{path}: {size:,} bytes, where {index.name} says {tokens:,} ids of {np.dtype(dtype).itemsize} bytes; "
            "restore both from a copy"
        )
    return dtype


def type_of_ids(path: Path, size: int, vocab_size: int) -> str | None:
    """The type that the ids of a raw file show, from a sample of them; None if it is not clear.

    Of ids in 32 or 64 bits, the upper halves are 0, or at most those of the vocabulary: in 16 bits, every second id
    would be.  Raises ValueError for big-endian ids.
    """
    halves = _sample(path, size)
    native = halves.reshape(-1, 4).copy()
    upper = (vocab_size - 1) >> 16
    lower_max, upper_max = native[:, ::2].max(initial=0), native[:, 1::2].max(initial=0)
    if size % 4 == 0 and (upper_max <= upper or (upper_max < MOST_UPPER and lower_max > MOST_UPPER**2)):
        if len(halves) < 2 * FEWEST or not halves.any():
            return None
        if size % 8 == 0 and upper == 0 and not native[:, 1:].any():
            return "<u8" if _varies(native[:, 0]) else None
        if size % 8 == 0 and not native[:, 2:].any():
            return "<u8"
        return "<u4"
    swapped = native.byteswap()
    fits, fits_swapped = (native < vocab_size).all(), (swapped < vocab_size).all()
    is_swapped_wide = (
        size % 4 == 0 and upper < 256 and (swapped[:, ::2] <= upper).all() and (native[:, ::2] > upper).any()
    )
    if len(halves) >= FEWEST and ((fits_swapped and not fits) or is_swapped_wide):
        raise ValueError(f"{path}: its ids are big-endian; convert them, with NumPy: ids.astype('<u4').tofile(NAME)")
    if size % 2 == 0 and vocab_size <= 1 << 16 and (len(halves) >= FEWEST or fits) and halves.any():
        return "<u2"
    return None


def _varies(values: np.ndarray) -> bool:
    return bool((values != values[0]).any())


def _sample(path: Path, size: int) -> np.ndarray:
    """Ids of 16 bits at the beginning, in the middle and at the end, in groups of 8 bytes as they are in the file."""
    parts = []
    with path.open("rb") as file:
        for begin in sorted({0, max(size // 2 - SAMPLE, 0) // 8 * 8, max(size - SAMPLE, 0) // 8 * 8}):
            file.seek(begin)
            data = file.read(SAMPLE)
            parts.append(data[: len(data) // 8 * 8])
    return np.frombuffer(b"".join(parts), "<u2")
