"""The default number of threads: affinity, quotas of control groups, OMP_NUM_THREADS; cores that others use."""

import os
from pathlib import Path

import pytest

from llmtrain.base.threads import allowed_cpus, busy_reason, cpu_quota, default_threads, physical_cores


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000\n", 0.5), ("", None)]
)
def test_the_quota_of_a_container_is_read(tmp_path: Path, text: str, quota: float | None) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_the_least_quota_of_nested_groups_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/user.slice/job"
    group.mkdir(parents=True)
    write(tmp_path, proc__self__cgroup="0::/user.slice/job\n")
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("300000 100000\n")
    assert cpu_quota(tmp_path) == 3.0
    (group / "cpu.max").write_text("200000 100000\n")
    assert cpu_quota(tmp_path) == 2.0


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("250000", 2.5)])
def test_the_quota_of_version_1_is_read(tmp_path: Path, quota: str, expected: float | None) -> None:
    group = tmp_path / "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    group.mkdir(parents=True)
    write(tmp_path, proc__self__cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    (group / "cpu.cfs_quota_us").write_text(quota + "\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == expected


def test_the_default_is_bounded_by_quota_and_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(tmp_path) == physical_cores() <= len(allowed_cpus())
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert default_threads(tmp_path) == 1
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("4,2", 4), ("0", None), ("many", None)])
def test_omp_num_threads_is_taken(monkeypatch: pytest.MonkeyPatch, value: str, expected: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == (expected or min(physical_cores(), int(cpu_quota() or physical_cores()) or 1))


def test_busy_cores_are_noticed(tmp_path: Path) -> None:
    cpus = os.cpu_count() or 1
    busy = f"{cpus * 6}.50 3.00 1.00 {cpus * 7}/900 4711\n"
    write(tmp_path, proc__loadavg=busy)
    found = busy_reason(2, tmp_path)
    assert found is not None
    assert f"{cpus * 7 - 1} other threads want one of {cpus} (load {cpus * 6}.50)" in found
    assert "runtime.num_threads=1" in found
    assert busy_reason(1, tmp_path) is None
    write(tmp_path, proc__pressure__cpu="some avg10=63.20 avg60=50.00 avg300=1.00 total=1\nfull avg10=0.00 total=0\n")
    assert busy_reason(2, tmp_path) == found
    write(tmp_path, proc__pressure__cpu="some avg10=1.20 avg60=50.00 avg300=1.00 total=1\n")
    assert busy_reason(2, tmp_path) is None
    write(tmp_path, proc__loadavg=f"0.50 3.00 1.00 {cpus * 7}/900 4711\n")
    assert busy_reason(2, tmp_path) is None
    assert busy_reason(2, tmp_path / "nowhere") is None
