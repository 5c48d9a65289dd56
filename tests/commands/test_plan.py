"""``llmtrain plan`` through the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmtrain import Run
from llmtrain.cli.main import main
from llmtrain.config.assemble import assemble
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.trace import fake_tensors
from llmtrain.train.rehearsal import made_up_batch
from tests.helpers.cli import TINY

NO_PROBE = (*TINY, "probe=false")


def test_a_plan_with_a_probe_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY, "loop.max_steps=50", "json=plan.json", "chart=plan.png"]) == 0
    output, progress = capfd.readouterr()
    assert "measured" in output
    assert progress.splitlines()[-1] == "training 5 to 22 steps"
    assert "estimating the memory of a step" in progress
    assert "fits" in output
    assert "█" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["step_seconds"] > 0
    assert figures["measured_peak_bytes"] > 100e6  # Python and torch alone take more
    assert figures["peak_bytes"] >= figures["measured_peak_bytes"]
    assert figures["tokens"] == 50 * 4 * 32


@pytest.mark.slow
def test_accumulation_auto_is_planned_with_the_micro_batch_it_finds(tmp_path: Path) -> None:
    overrides = [override for override in TINY if not override.startswith("accumulation.micro")]
    path = tmp_path / "plan.json"
    assert main(["plan", *overrides, "accumulation=auto", "loop.max_steps=20", f"json={path}"]) == 0
    figures = json.loads(path.read_text())
    assert figures["micro_batch_size"] == 4
    assert figures["measured_peak_bytes"] is not None
    # 16 GB: GPT-2 small with 64 sequences of 1024 tokens at once does not fit, some of them do
    large = ["model=gpt124m", "device=t4-16gb", "accumulation=auto", "accumulation.batch_size=64", f"json={path}"]
    assert main(["plan", *large]) == 0
    figures = json.loads(path.read_text())
    assert 1 <= figures["micro_batch_size"] < 64
    assert figures["fits"]


def test_the_json_is_consistent(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", *NO_PROBE, "loop.max_steps=20", "watts=100", "price_per_hour=3600", f"json={path}"]) == 0
    figures = json.loads(path.read_text())
    assert figures["measured_peak_bytes"] is None
    assert figures["estimated_peak_bytes"] == sum(figures["memory_bytes"].values())
    seconds = sum(figures["seconds"].values())
    assert figures["price"] == pytest.approx(seconds)
    assert figures["kilowatt_hours"] == pytest.approx(100 * seconds / 3.6e6)
    run = Run.compose(*TINY)
    parts = assemble(run, torch.device("cpu"))
    assert figures["checkpoint_bytes"] == pytest.approx(parts.checkpoint_bytes(), abs=200)  # optimizer padding below
    assert figures["flops_per_token"] == parts.unit.flops_per_token(32)


def test_a_named_device_is_planned_without_being_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "device=h100-80gb", "price_per_hour=2"]) == 0
    output = capfd.readouterr().out
    assert "NVIDIA H100 SXM 80 GB" in output
    assert "bf16" in output  # what precision=auto is there
    assert "estimated: 40% of 989 TFLOP/s" in output
    assert "at 700 W" in output
    assert "at 2 an hour" in output
    assert "fits:" in output


def test_the_total_of_the_memory_is_what_must_fit(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "device=h100-80gb"]) == 0
    output = capfd.readouterr().out
    total = re.search(r"\ntotal +([\d.]+ MB)", output)
    assert total is not None
    assert f"fits: needs {total[1]} of 84.9 GB (79.1 GiB)" in output
    assert re.search(r"; [\d.]+ MB of it are tensors", output)


def test_the_known_devices_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "device=list"]) == 0
    output = capfd.readouterr().out
    assert re.search(r"h100-80gb +84\.9 GB \(79\.1 GiB\) +989 TFLOP/s +NVIDIA H100 SXM 80 GB", output)
    assert re.search(r"v100-16gb +17\.0 GB \(15\.8 GiB\) +none", output)
    assert main(["plan", "device=list", "json=plan.json"]) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=h100-80", "device=h100-80: not a known device; did you mean h100-80gb?"),
        ("chart=plan.svg", "chart=plan.svg: must be a .png file"),
        ("json=nowhere/plan.json", "json=nowhere/plan.json: there is no directory"),
        ("price_per_hour=-1", "price_per_hour=-1.0: must not be negative"),
        ("watts=0", "watts=0.0: must be positive"),
        ("pobe=false", "did you mean probe?"),
    ],
)
def test_a_mistake_is_named(override: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, override]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_plan_that_does_not_fit_suggests_one_that_does(capfd: pytest.CaptureFixture[str]) -> None:
    """As on a device of 15 GB: as many weights as GPT-2 large in few layers; their state alone takes 13 of them."""
    overrides = ("model=gpt774m", "model.num_layers=6", "model.hidden_size=3072", "model.num_heads=48",
                 "device=t4-16gb", "precision=fp16", "data.sequence_length=512",
                 "accumulation.batch_size=8", "accumulation.micro_batch_size=8", "loop.max_steps=5")  # fmt: skip
    assert main(["plan", *overrides]) == 0
    output = capfd.readouterr().out
    assert re.search(r"does not fit: needs [\d.]+ GB, the device has [\d.]+ GB \([\d.]+ GiB\)\n", output)
    assert "optimizer=adamw_8bit" in output


def test_plan_accepts_settings_that_lint_reports(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *NO_PROBE, "optimizer.lr=1e-4", "schedule=constant", "loop.eval_batches=3"]) == 0
    assert main(["plan", "--cfg", "job", *TINY]) == 0
    assert "price_per_hour" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_model_is_planned_in_little_memory(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from llmtrain.cli.main import main
assert main(["plan", "model=gpt1558m", "loop.max_steps=100"]) == 0
status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would begin with that of the parent
print("RESIDENT", next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1,557,611,200" in done.stdout
    assert "819,200" in done.stdout  # 100 steps of 8 sequences of 1024 tokens
    assert not list(tmp_path.iterdir())
    assert int(done.stdout.splitlines()[-1].removeprefix("RESIDENT ")) < 1_000_000  # kB; the weights alone take 6 GB


def test_flops_are_those_of_torchs_counter() -> None:
    run = Run.compose("model=gpt124m", "tokenizer=gpt2", "precision=fp32")
    cpu = torch.device("cpu")
    blueprint = Blueprint(run, 50257, run.precision.build(cpu), 1)
    with fake_tensors():
        step = blueprint.build()
        batch = made_up_batch(run.objective, 1, 1024, is_packed=False).map(torch.zeros_like)  # without data too
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step.accumulate(batch, 1)
    assert step.unit.flops_per_token(1024) * 1024 == pytest.approx(counter.get_total_flops(), rel=0.02)
