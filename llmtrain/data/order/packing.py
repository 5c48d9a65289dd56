"""Several examples in a row: which ones share it."""

from collections import defaultdict

import numpy as np

WINDOW = 8192  # examples in a row of the file that are packed with one another


def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Put examples of ``lengths`` tokens, each at most ``row_length``, into as few rows as may be.

    Best-fit decreasing: the longest first, each where it leaves the least room (Johnson 1974; at most 11/9 of the best
    there is).  Follows from the lengths alone, and takes O(n log n) time.  An example stays near its place in the file,
    since ``WINDOW`` examples at a time are packed; their rows come in the order of their first examples.

    Returns the examples' numbers row after row, in a row as in the file, and where each row begins among them, with an
    end behind the last: int64.
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
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by the tokens they have room for
    rooms = 0  # a bit for each amount of room that some row has
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1  # the least that is enough
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
