"""The script of the first half hour: whatever a case does becomes a row, and the budget holds."""

import re
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import checks, options, runs
from benchmarks.gpu.case import Case, Row, Setup, print_row, read_rows, read_run, run_case
from benchmarks.gpu.results import Results
from llmtrain import Run
from tests.conftest import wants_gpu
from tests.test_docs import known_keys

ROOT = Path(__file__).parents[2]
MACHINE = {"name": "a machine", "device": "cpu"}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, True, MACHINE)


def python(code: str, **options: object) -> Case:
    return Case("a case", ("-c", code), **({"needs_gpu": False} | options))


def test_failure_and_timeout_are_rows_with_the_last_lines(setup: Setup) -> None:
    (failed,) = run_case(python("print('first\\nlast'); raise SystemExit(3)"), setup, 60)
    assert (failed["status"], failed["exit_status"], failed["said"]) == ("failed", 3, ["first", "last"])
    (late,) = run_case(python("import time; print('begun', flush=True); time.sleep(60)", seconds=0.8), setup, 60)
    assert late["status"] == "timeout"
    assert late["said"][-1].startswith("ended after")
    (good,) = run_case(python("raise SystemExit(75)", status=75), setup, 60)
    assert good["status"] == "ok"
    assert "said" not in good


def test_case_that_needs_a_gpu_is_replaced_or_left_out_without_one(setup: Setup) -> None:
    (composed,) = run_case(python("1/0", needs_gpu=True, rehearsal=("-c", "print(1)")), setup, 60)
    assert composed["status"] == "composed"
    (left_out,) = run_case(python("1/0", needs_gpu=True), setup, 60)
    assert left_out["status"] == "left out"


def test_rows_of_a_worker_follow_that_of_its_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_row("one", speed=1.5)
    print_row("two", status="failed")
    row: Row = {"case": "w", "status": "ok"}
    rows = read_rows(tmp_path, "noise\n" + capsys.readouterr().out, row)
    assert [(one["case"], one["status"]) for one in rows] == [("w", "ok"), ("w: one", "ok"), ("w: two", "failed")]
    assert read_rows(tmp_path, "noise", {"case": "w", "status": "ok"})[0]["status"] == "failed"


def test_results_that_cannot_be_read_fail_the_case(setup: Setup) -> None:
    def read(run: Path, output: str, row: Row) -> list[Row]:
        raise KeyError("tokens_per_second")

    (row,) = run_case(python("pass", read=read), setup, 60)
    assert row["status"] == "failed"
    assert "KeyError" in row["problem"]


def test_metrics_of_a_run_complete_its_row(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    common = '"mfu": 0.5, "memory_bytes": 7, "loss": 2.0'
    lines = [
        f'{{"step": {n}, "tokens_per_second": {speed}, {common}}}' for n, speed in enumerate((1, 9, 100, 300, 200))
    ]
    lines.append('{"event": "out_of_memory", "message": "halved"}')
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    (row,) = read_run(run_dir, "", {"case": "c", "status": "ok"})
    assert (row["tokens_per_second"], row["mfu"], row["memory_bytes"], row["loss"]) == (200, 0.5, 7, 2.0)
    assert row["events"] == ["out_of_memory: halved"]


def test_budget_of_a_part_ends_it_and_its_rows_are_written(setup: Setup, tmp_path: Path) -> None:
    results = Results(tmp_path / "results", dict(MACHINE), rehearses=True)
    cases = [python("pass"), python("1/0")]
    assert not script.run_part("checks", cases, setup, results, time.monotonic(), time.monotonic() + 60)
    text = results.path.with_suffix(".md").read_text()
    assert "1 of 2 rows are good" in text
    assert "ZeroDivisionError" in text
    again = Results(tmp_path / "results", dict(MACHINE), rehearses=True)
    assert script.run_part("options", cases, setup, again, time.monotonic(), time.monotonic())  # no time: left out
    assert {row["status"] for row in again.content["parts"]["options"]["rows"]} == {"left out"}
    assert len(again.content["parts"]["checks"]["rows"]) == 2  # of the earlier call


def test_parts_take_25_minutes_and_each_less_than_ten() -> None:
    seconds = [part.seconds for part in script.PARTS.values()]
    assert sum(seconds) <= 1500
    assert max(seconds) <= 540


def test_tests_become_rows(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="one" time="1.25"/>'
        '<testcase classname="tests.a" name="two" time="0"><failure message="no">line\nE  1 != 2</failure></testcase>'
        '<testcase classname="tests.b" name="three" time="0"><skipped message="needs a CUDA device"/></testcase>'
        "</testsuite></testsuites>"
    )
    rows = checks.read_tests(tmp_path / "tests", "", {"case": "tests", "status": "failed"})
    assert [(row["case"], row["status"]) for row in rows[1:]] == [
        ("a: one", "ok"), ("a: two", "failed"), ("b: three", "left out")
    ]  # fmt: skip
    assert rows[2]["said"][-1] == "E  1 != 2"


def overrides_of(case: Case) -> list[str]:
    return [part for part in case.command[3:] if not part.startswith(("run_dir=", "json=", "probe="))]


def test_overrides_of_every_case_exist(tmp_path: Path) -> None:
    """Options and keys; that each case composes is what the rehearsal shows."""
    full = Setup(tmp_path, False, MACHINE | {"device": "cuda"})
    cases = [case for part in (options, runs) for case in part.cases(full) if case.command[1] == "llmtrain"]
    assert len({case.name for case in cases}) == len(cases) > 50
    known = known_keys()
    for override in sorted({override for case in cases for override in overrides_of(case)}):
        key, _, value = override.partition("=")
        if "." in key:
            assert key in known, override
        else:
            assert (ROOT / "conf" / key / f"{value}.yaml").exists(), override
    Run.compose(*overrides_of(cases[0]))


def test_requirements_are_those_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "benchmarks/gpu/requirements.txt").read_text().splitlines()
    names = {re.split("[<>=]", line)[0]: line for line in lines if not line.startswith("#")}
    assert {names.get(re.split("[<>=]", want)[0]) for want in wanted if not want.startswith("torch")} == {
        want for want in wanted if not want.startswith("torch")
    }


def test_gpus_are_hidden_unless_tests_for_them_are_asked_for() -> None:
    assert wants_gpu("gpu")
    assert wants_gpu("gpu and not slow")
    assert not wants_gpu("")
    assert not wants_gpu("not gpu")
    assert not wants_gpu("slow and not gpu")


def test_script_refuses_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(script, "describe_machine", lambda: dict(MACHINE))
    with pytest.raises(SystemExit) as ended:
        script.main(["options"])
    assert ended.value.code == 2
    assert "there is no GPU here; --rehearse" in capsys.readouterr().err
