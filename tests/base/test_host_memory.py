"""Host memory of an exact size, and its registration with CUDA, of which a stand-in takes the place."""

import contextlib
import mmap
import threading
from types import SimpleNamespace

import pytest
import torch

from llmtrain.base.host_memory import PORTABLE, CudaRegistration, HostMemory, registration_for
from tests.helpers.host_memory import Registry


@pytest.mark.parametrize("num_bytes", [1, 63, 4096, 4097, 100_000])
def test_memory_has_the_size_asked_for_and_begins_a_page(num_bytes: int) -> None:
    memory = HostMemory(num_bytes)
    assert memory.data.nbytes == memory.data.untyped_storage().nbytes() == num_bytes
    assert memory.data.data_ptr() % mmap.PAGESIZE == 0
    memory.data.fill_(7)
    assert int(memory.data.sum()) == 7 * num_bytes


def test_memory_of_no_bytes_is_not_pinned() -> None:
    registry = Registry()
    assert HostMemory(0, registry).data.nbytes == 0
    assert registry.pinned == {}


def test_memory_is_unpinned_once_when_it_is_closed_or_forgotten() -> None:
    registry = Registry()
    memory = HostMemory(5000, registry)
    view = memory.data[:100]
    assert registry.pinned == {memory.data.data_ptr(): 5000}
    memory.close()
    memory.close()
    assert registry.pinned == {}
    memory = HostMemory(5000, registry)
    del memory
    assert registry.pinned == {}
    assert view.fill_(3).sum() == 300  # the bytes live as long as a tensor needs them


def test_memory_that_is_not_pinned_can_be_used_and_has_the_reason() -> None:
    registry = Registry(refuses="CUDA: out of memory")
    memory = HostMemory(5000, registry)
    assert memory.refusal == "CUDA: out of memory"
    memory.data.fill_(1)
    memory.close()
    assert registry.calls == ["pin 5000"]


def test_a_cpu_needs_no_registration() -> None:
    assert registration_for(torch.device("cpu")) is None


class Runtime:
    """A stand-in for ``torch.cuda.cudart()``, which records the calls and the threads that make them."""

    cudaError = staticmethod(int)

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("register", address, num_bytes, flags, threading.current_thread().name))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return {2: "out of memory"}[code]


@pytest.mark.parametrize("code", [0, 2])
def test_memory_is_registered_with_cuda_by_a_thread_of_its_own(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps the error of a failed call for its thread, where torch would raise it at the next kernel."""
    runtime = Runtime(code)
    devices: list[int] = []
    stand_in = SimpleNamespace(
        cudart=lambda: runtime, device=lambda index: devices.append(index) or contextlib.nullcontext()
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    memory = HostMemory(9000, CudaRegistration(torch.device("cuda:1")))
    address = memory.data.data_ptr()
    assert runtime.calls == [("register", address, 9000, PORTABLE, "pin")]
    assert memory.refusal == (None if code == 0 else "CUDA: out of memory")
    memory.close()
    assert runtime.calls[1:] == ([("unregister", address)] if code == 0 else [])
    assert set(devices) == {1}


def test_an_error_of_the_registration_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no libcudart")

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=broken, device=lambda index: contextlib.nullcontext()))
    memory = HostMemory(10, CudaRegistration(torch.device("cuda:0")))
    assert memory.refusal == "RuntimeError: no libcudart"


@pytest.mark.gpu
def test_torch_takes_registered_memory_for_pinned() -> None:
    memory = HostMemory(100_000, registration_for(torch.device("cuda")))
    assert memory.refusal is None
    assert memory.data.is_pinned()
    source = torch.randint(0, 255, (100_000,), dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.data.copy_(source, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(memory.data, source.cpu())
    memory.close()
    assert not memory.data.is_pinned()
