"""Packing of examples: several share a row."""

from collections import defaultdict

import numpy as np

WINDOW = 8192  # consecutive examples that are packed together


def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Put examples of ``lengths`` tokens, each at most ``row_length``, into few rows.

    Best-fit decreasing: the longest first, each into the row where it leaves the least room (Johnson 1974; at most 11/9
    of the optimal number of rows).  The result depends on the lengths alone; the time is O(n log n).  An example stays
    near its place in the file, since ``WINDOW`` examples at a time are packed; rows are in the order of their first
    examples.

    Returns the numbers of the examples, row by row and in the order of the file within a row, and the start of each
    row among them, followed by the end of the last: int64.
    """
    members: list[np.ndarray] = []
    begins = [0]
    for start in range(0, len(lengths), WINDOW):
        for row in _pack_window(lengths[start : start + WINDOW].tolist(), row_length):
            members.append(np.array(row, np.int64) + start)
            begins.append(begins[-1] + len(row))
    return np.concatenate([np.empty(0, np.int64), *members]), np.array(begins, np.int64)


def _pack_window(lengths: list[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by the number of free tokens
    rooms = 0  # bit r: some row has r free tokens
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1  # the smallest sufficient room
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(example)
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    return sorted(map(sorted, rows))
