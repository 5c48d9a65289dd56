"""From the records of a run to its table and plot: medians, ranges, and what each failed with."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.groups import Group, Row
from benchmarks.measurement import Record
from benchmarks.plot import draw
from benchmarks.suites import Facts, Suite
from benchmarks.suites.registry import SUITES

DISTURBED = 0.2  # cores; below it are the system's own doings


def write_report(path: Path) -> str:
    """Write the Markdown and the plot beside the JSON file ``path``; returns the Markdown."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records = content["records"]
    facts = find_facts(content)
    sections = [(suite, find_groups(suite, records, facts)) for suite in SUITES.values()]
    sections = [(suite, groups) for suite, groups in sections if groups]
    picture = path.with_suffix(".png")
    draw(sections, picture, f"{content['machine']['device']}, {content['date'][:10]}")
    text = "\n".join([*head(content, picture.name), *(line for each in sections for line in section(*each, records))])
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return text


# --- figures ----------------------------------------------------------------------------------------------------


def find_facts(content: dict[str, Any]) -> Facts:
    """The machine's own rates and what the fastest training here needs."""
    rates: dict[str, list[float]] = {}
    speeds: list[float] = []
    sheet = None
    for record in content["records"]:
        result = record.get("result", {})
        if record["suite"] == "matmul" and result:
            rates.setdefault(record["contestant"], []).append(result["flops_per_second"])
            sheet = result.get("data_sheet") or sheet
        elif record["suite"] == "training" and "tokens_per_second" in result:
            speeds.append(result["tokens_per_second"])
    medians = {precision: statistics.median(values) for precision, values in rates.items()}
    return Facts(content["flops_per_token"], medians, sheet, max(speeds, default=None))


def find_groups(suite: Suite, records: Sequence[Record], facts: Facts) -> list[Group]:
    """The rows of a suite's groups, in the order in which they were first measured."""
    mine = [record for record in records if record["suite"] == suite.name]
    names = list(dict.fromkeys(record["group"] for record in mine))
    return [
        Group(name, find_rows(suite, [record for record in mine if record["group"] == name], facts)) for name in names
    ]


def find_rows(suite: Suite, records: Sequence[Record], facts: Facts) -> list[Row]:
    """A row for each contestant of one group."""
    first, *others = suite.columns
    by_round: dict[str, dict[int, float]] = {}
    for record in records:
        mine = by_round.setdefault(record["contestant"], {})
        if "result" in record and (value := first.value(record, facts)) is not None:
            mine[record["round"]] = value
    reference = by_round.get(suite.reference or "", {})
    rows = []
    for contestant, values in by_round.items():
        own = [record for record in records if record["contestant"] == contestant]
        results = [record for record in own if "result" in record]
        ratios = []
        if contestant != suite.reference:
            pairs = [(reference[number], value) for number, value in values.items() if number in reference]
            ratios = [ours / other if suite.more_is_better else other / ours for ours, other in pairs]
        medians = [
            median_of([value for record in results if (value := column.value(record, facts)) is not None])
            for column in others
        ]
        problems = [f"not here: {record['absent']}" for record in own if "absent" in record]
        failures = [record["error"] for record in own if "error" in record]
        problems += [f"failed in {len(failures)} of {len(own)} rounds: {failures[0]}"] if failures else []
        rows.append(Row(contestant, list(values.values()), medians, ratios, problems))
    return rows


def median_of(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


# --- words ------------------------------------------------------------------------------------------------------


def head(content: dict[str, Any], picture: str) -> list[str]:
    """What was measured, where and how."""
    settings, machine, versions = content["settings"], content["machine"], content["versions"]
    batches = " and ".join(f"{size * settings['context']:,}" for size in settings["batch_sizes"])
    memory = machine["memory_available"]
    pages = machine["transparent_huge_pages"]
    steps = f"{settings['steps']} steps after {settings['warm_up']} of warm-up"
    done = max((record["round"] for record in content["records"]), default=0)
    rounds = f"{done} round{'s' * (done != 1)}"
    overrides = f" Overrides of ours: `{' '.join(settings['overrides'])}`." if settings["overrides"] else ""
    facts = [
        machine["device"], f"{memory / 1e9:.0f} GB of memory free" if memory else "", machine["system"],
        f"Python {machine['python']}", ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"CUDA {machine['cuda']}" if machine["cuda"] else "", machine["compiler"] or "no C++ compiler",
        f"transparent huge pages {pages}" if pages else "", f"commit {content['commit']}",
    ]  # fmt: skip
    return [
        f"# Benchmarks, {content['date'][:10]}",
        "",
        "; ".join(fact for fact in facts if fact) + ".",
        "",
        f"{settings['model']}, context {settings['context']}, {batches} tokens a step, "
        f"{content['flops_per_token'] / 1e6:,.1f} MFLOP a token; {steps} a process, each process fresh; medians of "
        f"{rounds} in which the contestants take turns, ranges over the rounds. Ratios are taken round by "
        f"round.{overrides}",
        "",
        *warning(content["records"]),
        f"![plot]({picture})",
        "",
    ]


def warning(records: Sequence[Record]) -> list[str]:
    """What to say where the machine was not ours alone."""
    disturbed = [record for record in records if record.get("cores_of_others", 0.0) > DISTURBED]
    if not disturbed:
        return []
    most = max(record["cores_of_others"] for record in disturbed)
    return [
        f"**Disturbed**: in {len(disturbed)} of {len(records)} measurements other processes took more than "
        f"{DISTURBED:g} cores, up to {most:g}. Do not rely on these figures.",
        "",
    ]


def section(suite: Suite, groups: Sequence[Group], records: Sequence[Record]) -> list[str]:
    """A suite's table, with what is to be known about the contestants."""
    mine = [record for record in records if record["suite"] == suite.name]
    has_others = [any(row.others[at] is not None for group in groups for row in group.rows)
                  for at in range(len(suite.columns) - 1)]  # fmt: skip
    shown = [column for column, has in zip(suite.columns[1:], has_others, strict=True) if has]
    has_ratio = any(row.ratios for group in groups for row in group.rows)
    titles = ["", "", suite.columns[0].title, "range", *([suite.comparison] if has_ratio else [])]
    titles += [column.title for column in shown]
    lines = [f"## {suite.title}", "", suite.about, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for group in groups:
        for row in group.rows:
            cells = [group.name, row.contestant, *figures(suite, row, has_ratio)]
            others = [value for value, has in zip(row.others, has_others, strict=True) if has]
            cells += [column.text(value) if value is not None else ""
                      for column, value in zip(shown, others, strict=True)]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *notes(mine), *spaced(suite.details(mine))]


def figures(suite: Suite, row: Row, has_ratio: bool) -> list[str]:
    """Median, range and ratio; or why there are none."""
    if row.median is None:
        return ["; ".join(row.problems).replace("|", "/") or "–", "", *([""] if has_ratio else [])]
    text = suite.columns[0].text
    cells = [text(row.median) + (f" ({'; '.join(row.problems)})".replace("|", "/") if row.problems else "")]
    cells.append(f"{text(min(row.values))}–{text(max(row.values))}")
    if has_ratio:
        ratios = row.ratios
        spread = f" ({min(ratios, default=0):.2f}–{max(ratios, default=0):.2f})" if len(ratios) > 1 else ""
        cells.append(f"{statistics.median(ratios):.2f} ×{spread}" if ratios else "")
    return cells


def notes(records: Sequence[Record]) -> list[str]:
    """How a contestant differs from the others, and its versions."""
    lines: dict[str, None] = {}  # in order, each once
    for record in records:
        result = record.get("result", {})
        if note := result.get("note"):
            versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
            lines[f"- {record['contestant']}: {note}{f' ({versions})' if versions else ''}."] = None
    return [*lines, ""] if lines else []


def spaced(lines: list[str]) -> list[str]:
    """With an empty line behind."""
    return [*lines, ""] if lines else []
