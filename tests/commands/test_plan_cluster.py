"""``llmtrain plan`` for several devices."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.main import main
from tests.helpers.cli import TINY

H100 = ("device=h100-80gb",)


def test_memory_time_and_price_of_a_mesh(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    overrides = (*TINY, "distributed=fsdp", "devices=16", *H100, "price_per_hour=2", "accumulation.batch_size=32")
    assert main(["plan", *overrides, "loop.max_steps=1000", f"json={path}", f"chart={tmp_path / 'plan.png'}"]) == 0
    output = capfd.readouterr().out
    assert re.search(r"devices +16 +NVIDIA H100 SXM 80 GB, 989 TFLOP/s in bf16", output)
    assert re.search(r"hosts +2 +of 8", output)
    assert "memory of a rank, bf16, shard 16" in output
    assert "at 2 an hour of a device" in output
    assert "distributed=fsdp distributed.replicate=1 distributed.shard=16" in output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads(path.read_text())
    (mesh,) = figures["meshes"]
    assert (mesh["shard"], mesh["replicate"], mesh["micro_batch_size"] * mesh["micro_batches"]) == (16, 1, 2)
    assert mesh["step_seconds"] == pytest.approx(sum(mesh["step_parts_seconds"].values()))
    assert mesh["needed_bytes"] == sum(mesh["memory_bytes"].values())
    assert mesh["tokens_per_second"] == pytest.approx(32 * 32 / mesh["step_seconds"])
    assert mesh["tokens_per_second_per_device"] == pytest.approx(mesh["tokens_per_second"] / 16)
    assert figures["seconds"]["training"] == pytest.approx(1000 * mesh["step_seconds"])
    hours = sum(figures["seconds"].values()) / 3600
    assert figures["price"] == pytest.approx(2 * 16 * hours)
    assert figures["kilowatt_hours"] == pytest.approx(0.7 * 16 * hours)


def test_meshes_are_ranked_and_their_overrides_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", *TINY, "distributed=auto", "devices=4", *H100, f"json={path}"]) == 0
    assert "meshes fit" in capfd.readouterr().out
    meshes = json.loads(path.read_text())["meshes"]
    assert len(meshes) >= 3
    assert [mesh["step_seconds"] for mesh in meshes] == sorted(mesh["step_seconds"] for mesh in meshes)
    for mesh in (meshes[0], meshes[-1]):  # what is printed is a plan of its own, with the same time
        again = tmp_path / "again.json"
        assert main(["plan", *TINY, "devices=4", *H100, *mesh["overrides"], f"json={again}"]) == 0
        (same,) = json.loads(again.read_text())["meshes"]
        assert same["step_seconds"] == pytest.approx(mesh["step_seconds"])


def test_a_slower_network_takes_longer(tmp_path: Path) -> None:
    def seconds(*overrides: str) -> float:
        path = tmp_path / "plan.json"
        assert main(["plan", *TINY, "distributed=ddp", "devices=4", *H100, *overrides, f"json={path}"]) == 0
        return float(json.loads(path.read_text())["meshes"][0]["step_seconds"])

    within = seconds()
    between = seconds("gpus_per_host=1")
    slow = seconds("gpus_per_host=1", "network=ethernet")
    assert within < between < slow
    assert between < seconds("gpus_per_host=1", "network_gigabits=100", "watts=350") < slow


def test_a_batch_that_ranks_cannot_share_is_planned_larger_and_said_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "distributed=fsdp", "devices=8", *H100]) == 0
    output = capfd.readouterr().out
    assert "accumulation.batch_size=4: cannot be divided among 8 ranks, planned with 8" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distributed=fsdp", *H100), "devices=null: the run is for several processes; say for how many GPUs"),
        (("distributed=fsdp", "devices=8"), "devices=8: a plan for several GPUs is for a kind of the table; say which"),
        (("devices=8", *H100), "devices=8: not the product of the mesh's degrees, all 1; take distributed=fsdp"),
        (("distributed=hsdp", "devices=12", *H100), "devices=12: not the product of the mesh's degrees"),
        (("distributed=fsdp", "devices=0", *H100), "devices=0: must be positive"),
        (("distributed=fsdp", "devices=8", *H100, "network=token_ring"), "must be one of infiniband, roce, ethernet"),
    ],
)
def test_a_mistake_is_named(overrides: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, *overrides]) == 2
    assert message in capfd.readouterr().err


def test_training_needs_a_mesh_that_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "distributed=auto"]) == 2
    assert "distributed=auto: a run needs a mesh that is named" in capfd.readouterr().err


def test_replicas_that_exchange_now_and_then_need_more_memory_and_less_network(tmp_path: Path) -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        words = (*TINY, "devices=4", "gpus_per_host=1", *H100, *overrides, f"json={path}")
        assert main(["plan", *words]) == 0
        mesh: dict[str, Any] = json.loads(path.read_text())["meshes"][0]
        return mesh

    ddp = plan("distributed=ddp")
    local, int8 = (
        plan("distributed=local_sgd", "distributed.sync_every=20", f"distributed.exchange={form}")
        for form in ("fp32", "int8")
    )
    assert local["overrides"][0] == "distributed=local_sgd"
    assert local["memory_bytes"]["optimizer"] == pytest.approx(2 * ddp["memory_bytes"]["optimizer"], rel=0.05)
    assert int8["step_parts_seconds"]["replicas"] < local["step_parts_seconds"]["replicas"]
