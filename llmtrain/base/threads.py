"""The number of CPU threads: by the cores that this process may use; and whether others use them as well.

Importing this module does not import torch.
"""

import os
from pathlib import Path

ROOT = Path("/")
BUSY = 1.5  # processes that run or wait, for each core, from which on threads hold one another up
WAITING = 10.0  # percent of the last ten seconds in which some process waited for a core


def default_threads(root: Path = ROOT) -> int:
    """Return the number of threads of a run that names none.

    ``OMP_NUM_THREADS`` where it is set, else one for each physical core that this process may use: by its affinity and
    by the quota of its control groups, as containers and clusters set them.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has one number for each level
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    quota = cpu_quota(root)
    cores = physical_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores() -> int:
    """Count the physical cores that this process may use; two hyper-threads of a core only slow matrix products."""
    cores = set()
    for cpu in allowed_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def allowed_cpus() -> set[int]:
    """Return the numbers of the logical processors that this process may use."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the least quota of the process's control groups, in processors; None: there is none.

    Version 2 has ``cpu.max``, "quota period" in microseconds; version 1 has two files.
    """
    quotas = [quota for folder in _control_groups(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _control_groups(root: Path) -> list[Path]:
    """List the folders of the process's control groups that may limit its processors, up to the topmost ones."""
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "cpu", mount / "cpu,cpuacct"]  # in a container its own group is at the top
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        base = mount if not controllers else mount / controllers
        if not controllers or "cpu" in controllers.split(","):
            group = Path(path.lstrip("/"))
            folders += [base / part for part in (group, *group.parents) if ".." not in part.parts]
    return folders


def _quota_of(folder: Path) -> float | None:
    both = _read(folder / "cpu.max").split()
    if not both:
        both = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if len(both) != 2 or not all(number.isdecimal() for number in both) or not int(both[1]):
        return None  # "max", or -1 in version 1: no quota
    return int(both[0]) / int(both[1])


def busy_reason(threads: int, root: Path = ROOT) -> str | None:
    """Say that other processes use the cores that ``threads`` threads are to run on; None if they do not.

    The threads of a run meet a thousand times a step, and all wait for one that has no core.
    """
    load = _read(root / "proc/loadavg").split()
    if threads < 2 or len(load) < 4:
        return None
    cpus = len(allowed_cpus())
    running = int(load[3].split("/")[0]) - 1  # without this one, which reads
    if float(load[0]) < BUSY * (os.cpu_count() or cpus) or running < cpus:
        return None
    pressure = [line for line in _read(root / "proc/pressure/cpu").splitlines() if line.startswith("some")]
    if pressure and float(pressure[0].split("avg10=")[1].split()[0]) < WAITING:
        return None
    return (
        f"the cores are busy: {running} other threads want one of {os.cpu_count() or cpus} (load {load[0]}); {threads} "
        "threads that wait for one another can make a run many times slower than runtime.num_threads=1"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
