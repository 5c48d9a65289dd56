"""The benchmarks: reports made of records, and a short measurement."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import write_report

pytestmark = pytest.mark.usefixtures("drawn_plots")

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == check, done.stdout + done.stderr
    return done


def record(suite: str, contestant: str, number: int, **outcome: Any) -> dict[str, Any]:
    common = {"suite": suite, "group": "bf16", "contestant": contestant, "measurement": contestant, "round": number}
    return common | {"precision": "bf16"} | outcome


def content(records: list[dict[str, Any]]) -> dict[str, Any]:
    machine = dict.fromkeys(["memory_available", "transparent_huge_pages", "cuda", "compiler"])
    return {
        "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "flops_per_token": 1e6, "records": records,
        "machine": machine | {"device": "a machine", "system": "Linux", "python": "3.11"}, "versions": {"torch": "2"},
        "settings": {"model": "tiny", "context": 64, "batch_sizes": [2], "steps": 2, "warm_up": 1, "rounds": 3,
                     "overrides": []},
    }  # fmt: skip


def test_the_report_holds_medians_ranges_paired_ratios_and_failures(tmp_path: Path) -> None:
    speeds = {"llmtrain": (100, 200, 300), "nanogpt": (50, 50, 200)}  # paired 2, 4, 1.5; of the medians it would be 4
    records = [
        record("matmul", "bf16", at, result={"flops_per_second": rate}) for at, rate in enumerate((1e9, 3e9, 2e9))
    ]
    for contestant, values in speeds.items():
        for at, value in enumerate(values):
            result = {"tokens_per_second": value, "memory_bytes": (1 + at) * 1e9}
            records.append(record("training", contestant, at, result=result))
    records.append(record("training", "litgpt", 0, absent="No module named 'litgpt'"))
    records.append(record("training", "hf_trainer", 0, result={"tokens_per_second": 400, "memory_bytes": 5e9}))
    records.append(record("training", "hf_trainer", 1, error="exit status 1: out of memory"))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(records)))

    printed = write_report(path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "|  |  | tok/s | range | ours is faster by | model GFLOP/s | MFU | peak memory, GB |" in lines
    assert "| bf16 | llmtrain | 200 | 100–300 |  | 0 | 10.0% | 2.00 |" in lines
    assert "| bf16 | nanogpt | 50 | 50–200 | 2.00 × (1.50–4.00) | 0 | 2.5% | 2.00 |" in lines
    assert "| bf16 | litgpt | not here: No module named 'litgpt' |  |  |  |  |  |" in lines
    failed = "400 (failed in 1 of 2 rounds: exit status 1: out of memory)"
    assert f"| bf16 | hf_trainer | {failed} | 400–400 | 0.25 × | 0 | 20.0% | 5.00 |" in lines
    assert "Disturbed" not in printed
    assert "| bf16 | bf16 | 2 | 1–3 |" in lines  # the machine, GFLOP/s
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "\n".join(lines) in printed


def test_modes_are_compared_with_one_another(tmp_path: Path) -> None:
    speeds = {"bf16": {"llmtrain": 400, "nanogpt": 200}, "fp32": {"llmtrain": 150, "nanogpt": 100}}
    records = [
        record("training", contestant, 1, result={"tokens_per_second": speed}) | {"group": mode}
        for mode, by_contestant in speeds.items()
        for contestant, speed in by_contestant.items()
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(records)))
    lines = write_report(path).splitlines()
    assert "|  |  | bf16 | fp32 |" in lines
    assert "| bf16 | nanogpt | 2.00 × | 0.75 × |" in lines
    assert "| fp32 | nanogpt | 4.00 × | 1.50 × |" in lines


def test_measurements_on_a_disturbed_machine_are_marked(tmp_path: Path) -> None:
    records = [record("training", "llmtrain", at, result={"tokens_per_second": 1}, cores_of_others=at) for at in (0, 1)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(records)))
    assert "**Disturbed**: in 1 of 2 measurements" in write_report(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nanogpt", "/no/such/folder"], "--nanogpt /no/such/folder: no such file or folder"),
        (["--variant", "precision=fp8"], "--variant 'precision=fp8': must be NAME: KEY=VALUE"),
        (["--peer-python", "nanogtp=/bin/sh"], "no such peer; there are nanogpt, hf_trainer, litgpt"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(arguments: list[str], message: str) -> None:
    assert message in benchmarks(*arguments, check=2).stderr


def test_lora_is_compared_by_trained_parameters_and_checkpoint_size(tmp_path: Path) -> None:
    figures = {"tokens_per_second": 300, "memory_bytes": 2e9, "trained_parameters": 2359296, "checkpoint_bytes": 28.4e6}
    others = {"tokens_per_second": 200, "memory_bytes": 3e9, "trained_parameters": 124439808, "checkpoint_bytes": 1.5e9}
    contestants = {"llmtrain, LoRA": figures, "HF Trainer, all weights": others}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content([record("lora", name, 1, result=each) for name, each in contestants.items()])))
    lines = write_report(path).splitlines()
    assert "| bf16 | llmtrain, LoRA | 300 | 300–300 |  | 2.00 | 2,359,296 | 28.4 |" in lines
    assert "| bf16 | HF Trainer, all weights | 200 | 200–200 | 1.50 × | 3.00 | 124,439,808 | 1,500.0 |" in lines


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "benchmarks" / "suites").glob("[a-z]*.py")))
def test_every_suite_can_be_imported(module: str) -> None:
    importlib.import_module(f"benchmarks.suites.{module}")


@pytest.mark.slow
def test_a_training_suite_measures_variants_and_names_a_missing_peer(tmp_path: Path) -> None:
    benchmarks(
        "--suites", "training", "--modes", "fp32", "--peers", "nanogpt", "--model", "tiny", "--tokenizer", "byte",
        "--context", "64", "--steps", "2", "--batch-sizes", "8", "--rounds", "1", "--output", str(tmp_path),
        "--variant", "lion: optimizer=lion",
    )  # fmt: skip
    (path,) = tmp_path.glob("*-bench-*.json")
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".png").exists()
    records = json.loads(path.read_text())["records"]
    assert not [record for record in records if "error" in record]
    assert {record["contestant"] for record in records if "absent" in record} == {"nanogpt"}
    results = {record["contestant"]: record["result"] for record in records if "result" in record}
    assert len(results["llmtrain"]["step_seconds"]) == 2
    assert 100 < results["llmtrain, lion"]["tokens_per_second"] < 1e7
