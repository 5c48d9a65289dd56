"""A run on two machines: two network namespaces with names of their own, and a link between them that is cut."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"  # addresses, and names of the namespaces
TIMEOUT = 4.0
# Each rank also has a host name of its own
CONNECTION = "ip netns exec {host} unshare --uts sh -c 'echo {host} > /proc/sys/kernel/hostname; exec sh -c \"$1\"' sh"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@pytest.fixture
def link() -> Iterator[str]:
    """The name of the first machine's end of a link between both."""
    ends = f"lt{os.getpid() % 10**6}a", f"lt{os.getpid() % 10**6}b"
    made: list[str] = []
    try:
        for name in (FIRST, SECOND):
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, device in zip(made, ends, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{name}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"needs the right to make network namespaces: {error}")
    yield ends[0]
    for name in made:
        ip("netns", "del", name)


@pytest.mark.slow
def test_a_link_that_is_cut_ends_the_run_with_the_name_of_the_host(link: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOSTFILE": str(file), "CONNECTION": CONNECTION,
                                "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ""}  # fmt: skip
    del environment["GLOO_SOCKET_IFNAME"]
    program = [str(HELPERS / "beating_program.py"), "loop", "1", str(tmp_path), str(TIMEOUT)]
    with (tmp_path / "errors").open("wb") as errors:
        supervisor = subprocess.Popen([sys.executable, str(HELPERS / "supervise.py"), "2", "0", *program],
                                      env=environment, stdout=errors, stderr=errors)  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not all((tmp_path / f"running-{rank}").exists() for rank in (0, 1)):
            assert supervisor.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.1)
        ip("-n", FIRST, "link", "set", link, "down")
        cut = time.monotonic()
        status = supervisor.wait(timeout=60)
        print(f"ended {time.monotonic() - cut:.1f} s after the cut, with a time-out of {TIMEOUT:g} s")
        text = (tmp_path / "errors").read_text()
        print(text)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert status == 1
    assert f"no heartbeat from rank 1 on host {SECOND} for" in text
    assert "1 rank waits in all_reduce at step" in text
