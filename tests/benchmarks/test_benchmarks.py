"""The harness under benchmarks/: what it makes of records, and that it still measures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_the_table_holds_medians_ranges_paired_ratios_and_failures(tmp_path: Path) -> None:
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

    printed = benchmarks("--report", str(path)).stdout
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
    lines = benchmarks("--report", str(path)).stdout.splitlines()
    assert "|  |  | bf16 | fp32 |" in lines
    assert "| bf16 | nanogpt | 2.00 × | 0.75 × |" in lines
    assert "| fp32 | nanogpt | 4.00 × | 1.50 × |" in lines


def test_a_machine_that_others_used_is_told(tmp_path: Path) -> None:
    records = [record("training", "llmtrain", at, result={"tokens_per_second": 1}, cores_of_others=at) for at in (0, 1)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(records)))
    assert "**Disturbed**: in 1 of 2 measurements" in benchmarks("--report", str(path)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nanogpt", "/no/such/folder"], "--nanogpt /no/such/folder: no such file or folder"),
        (["--variant", "precision=fp8"], "--variant 'precision=fp8': must be NAME: KEY=VALUE"),
        (["--peer-python", "nanogtp=/bin/sh"], "no such peer; there are nanogpt, hf_trainer, litgpt"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments: list[str], message: str) -> None:
    assert message in benchmarks(*arguments, check=2).stderr


def test_lora_is_compared_by_what_is_trained_and_kept(tmp_path: Path) -> None:
    figures = {"tokens_per_second": 300, "memory_bytes": 2e9, "trained_parameters": 2359296, "checkpoint_bytes": 28.4e6}
    others = {"tokens_per_second": 200, "memory_bytes": 3e9, "trained_parameters": 124439808, "checkpoint_bytes": 1.5e9}
    contestants = {"llmtrain, LoRA": figures, "HF Trainer, all weights": others}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content([record("lora", name, 1, result=each) for name, each in contestants.items()])))
    lines = benchmarks("--report", str(path)).stdout.splitlines()
    assert "| bf16 | llmtrain, LoRA | 300 | 300–300 |  | 2.00 | 2,359,296 | 28.4 |" in lines
    assert "| bf16 | HF Trainer, all weights | 200 | 200–200 | 1.50 × | 3.00 | 124,439,808 | 1,500.0 |" in lines


@pytest.mark.slow
def test_lora_is_measured_beside_peft_from_the_same_weights(tmp_path: Path) -> None:
    benchmarks(
        "--suites", "lora", "--modes", "bf16", "--peers", "hf_trainer", "--model", "tiny", "--tokenizer", "byte",
        "--context", "64", "--steps", "2", "--batch-sizes", "4", "--rounds", "1", "--output", str(tmp_path),
    )  # fmt: skip
    (path,) = tmp_path.glob("*-bench-*.json")
    results = {record["contestant"]: record["result"] for record in json.loads(path.read_text())["records"]}
    adapters = [name for name in results if "LoRA" in name]
    assert len(adapters) == 3
    assert len(results) == 5
    trained = {name: result["trained_parameters"] for name, result in results.items()}
    # rank 16 in two blocks: inputs and outputs of qkv, projection, up and down, of 32 and 128 numbers
    assert {trained[name] for name in adapters} == {2 * 16 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)}
    assert trained["llmtrain, all weights"] == trained["HF Trainer, all weights"] > 2 * trained["llmtrain, LoRA"]
    sizes = {name: result["checkpoint_bytes"] for name, result in results.items()}
    assert max(sizes[name] for name in adapters) < sizes["llmtrain, all weights"]
    assert all(len(result["step_seconds"]) == 2 for result in results.values())


@pytest.mark.slow
def test_every_suite_measures_and_a_peer_that_is_missing_is_told(tmp_path: Path) -> None:
    text = tmp_path / "some text.txt"
    text.write_text("A text to be encoded, and then another.<|endoftext|>" * 1000)
    benchmarks(
        "--suites", "matmul", "training", "start", "loader", "tokenizer", "checkpoint", "--modes", "fp32",
        "--peers", "nanogpt", "--model", "tiny", "--tokenizer", "byte", "--context", "64", "--steps", "2",
        "--batch-sizes", "8", "--save-every", "2", "--rounds", "1", "--text", str(text), "--output", str(tmp_path),
        "--variant", "lion: optimizer=lion",
    )  # fmt: skip
    (path,) = tmp_path.glob("*-bench-*.json")
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".png").exists()
    records = json.loads(path.read_text())["records"]
    assert not [record for record in records if "error" in record]
    absent = {(record["suite"], record["contestant"]) for record in records if "absent" in record}
    assert ("training", "nanogpt") in absent
    assert absent <= {("training", "nanogpt"), ("start", "nanogpt"), ("tokenizer", "tokenizers, batch")}
    training = {record["contestant"]: record.get("result") for record in records if record["suite"] == "training"}
    assert len(training["llmtrain"]["step_seconds"]) == 2
    assert 100 < training["llmtrain, lion"]["tokens_per_second"] < 1e7
    encoded = {
        record["result"]["tokens"] for record in records if record["suite"] == "tokenizer" and "result" in record
    }
    assert len(encoded) == 1
    saves = {record["contestant"]: record["result"] for record in records if record["suite"] == "checkpoint"}
    assert set(saves) == {"none", "asynchronous", "synchronous", "torch.save alone"}
    assert saves["synchronous"]["held_seconds"] > 0
