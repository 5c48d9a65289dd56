"""The ceilings of the machine, and the tests that need a GPU."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.case import ROOT, SAID_LINES, Case, Row, Setup, worker

PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-n", "8", "--timeout=200", "--junitxml={run}.xml")


def cases(setup: Setup) -> list[Case]:
    """The tests first: they are what must not be missing."""
    command = (*PYTEST, *files())
    return [
        Case("tests", command, seconds=240, rehearsal=(*command, "--collect-only"), read=read_tests),
        worker("ceilings", "ceilings", *(["--rehearse"] if setup.rehearses else []), seconds=90, needs_gpu=False),
    ]  # fmt: skip


def files() -> list[str]:
    """The files with tests marked gpu: others may import packages that are not installed there."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def read_tests(run: Path, output: str, row: Row) -> list[Row]:
    """A row for each test."""
    report = run.with_suffix(".xml")
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        status, said = "ok", []
        for kind in ("failure", "error", "skipped"):
            if (found := case.find(kind)) is not None:
                status = "left out" if kind == "skipped" else "failed"
                text = f"{found.get('message') or ''}\n{found.text or ''}"
                said = [line[:300] for line in text.splitlines() if line.strip()][-SAID_LINES:]
        module = (case.get("classname") or "").removeprefix("tests.")
        name, seconds = f"{module}: {case.get('name')}", round(float(case.get("time") or 0), 1)
        rows.append({"case": name, "status": status, "seconds": seconds} | ({"said": said} if said else {}))
    return [row, *rows]
