"""The results of a run of parts: JSON after every case, and a table."""

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Row

COLUMNS = ("case", "status", "seconds", "tokens/s", "MFU", "peak GB", "loss", "figures")
SHOWN = {"case", "command", "status", "seconds", "tokens_per_second", "mfu", "memory_bytes", "loss", "said",
         "exit_status", "events"}  # fmt: skip


class Results:
    """The rows of the parts, in ``FOLDER/DATE-gpu-DEVICE.json`` and ``.md``."""

    def __init__(self, folder: Path, machine: dict[str, Any], *, rehearses: bool) -> None:
        device = "rehearsal" if rehearses else machine["device"]
        self.path = folder / f"{datetime.date.today().isoformat()}-gpu-{device}.json"
        self.content: dict[str, Any] = {"machine": machine, "parts": {}}
        if self.path.exists():  # parts that were run before, each in a call of its own
            self.content["parts"] = json.loads(self.path.read_text(encoding="utf-8"))["parts"]

    def begin(self, part: str) -> None:
        """Drop the rows that an earlier call left for the part."""
        self.content["parts"][part] = {"rows": []}

    def add(self, part: str, rows: list[Row], seconds: float) -> None:
        """Add rows, and write both files."""
        self.content["parts"][part]["rows"] += rows
        self.content["parts"][part]["seconds"] = round(seconds, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        self.path.with_suffix(".md").write_text(table(self.content), encoding="utf-8")


def table(content: dict[str, Any]) -> str:
    """The Markdown of all parts."""
    machine = content["machine"]
    lines = [
        f"# The first half hour on {machine['name']}",
        "",
        ", ".join(f"{key} {value}" for key, value in machine.items() if key != "name" and value is not None),
        "",
    ]
    for part, content_of in content["parts"].items():
        rows = content_of["rows"]
        good = sum(row["status"] in ("ok", "composed") for row in rows)
        lines += [f"## {part}", "", f"{good} of {len(rows)} rows are good; {content_of.get('seconds', 0):.0f} s.", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(line_of, rows), ""]
        for row in rows:
            if row.get("said"):
                lines += [f"**{row['case']}**: `{row.get('command', '')}`", "", "```", *row["said"], "```", ""]
    return "\n".join(lines) + "\n"


def line_of(row: Row) -> str:
    """A row of the table."""
    others = [f"{key} {short(value)}" for key, value in row.items() if key not in SHOWN and value not in (None, "")]
    mfu, memory, loss = row.get("mfu"), row.get("memory_bytes"), row.get("loss")
    cells = [
        row["case"], row["status"], f"{row['seconds']:.0f}" if "seconds" in row else "",
        f"{row['tokens_per_second']:,.0f}" if row.get("tokens_per_second") else "",
        f"{mfu:.1%}" if mfu else "", f"{memory / 1e9:.2f}" if memory else "", f"{loss:.4f}" if loss is not None else "",
        "; ".join([*others, *row.get("events", [])]),
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def short(value: Any) -> str:
    """A figure as it is read."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
