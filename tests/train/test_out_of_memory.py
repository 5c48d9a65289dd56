"""Retries with smaller batches when memory runs out."""

import pytest
import torch

from llmtrain.train.out_of_memory import halve_on_out_of_memory, is_out_of_memory


def test_sizes_are_halved_until_it_fits() -> None:
    tried, noted = [], []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError(f"no room for {size}\nand more")
        return f"done with {size}"

    result = halve_on_out_of_memory(work, 11, lambda size, message: noted.append((size, message)))
    assert result == "done with 2"
    assert tried == [11, 6, 3, 2]
    assert noted == [(6, "no room for 11"), (3, "no room for 6"), (2, "no room for 3")]


def test_a_single_sequence_that_does_not_fit_is_an_error() -> None:
    def work(size: int) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        halve_on_out_of_memory(work, 4)


def test_other_errors_are_not_caught() -> None:
    def work(size: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        halve_on_out_of_memory(work, 4)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB",
        "HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 15.92 GiB",
        "MPS backend out of memory (MPS allocated: 8.20 GB, other allocations: 1.10 GB, max allowed: 9.07 GB)",
        "InductorError: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "HIP error: out of memory\nSearch for `hipErrorOutOfMemory' in the HIP documentation",
        "Search for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES",
        "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCTensorRandom.cu:25",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [HIP]:  Code: 2, Messsage: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(&handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
    ],
)
def test_texts_of_the_libraries_are_recognised(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.AcceleratorError(text))
    assert not is_out_of_memory(ValueError(text))


@pytest.mark.parametrize(
    "text",
    [
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block sizes or "
        "`num_stages` may help.",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: too many resources requested for launch",
        "Triton Error [CUDA]: invalid argument",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle, opa, opb, m, n, k)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd( handle, params, jobz )`",
        "CUDA-capable devices are busy or unavailable",
        "data/out of memory.txt, line 3: no text",
    ],
)
def test_other_texts_are_not_taken_for_a_lack_of_memory(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


def test_an_error_that_follows_from_a_lack_of_memory_is_one() -> None:
    follows = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not is_out_of_memory(follows)
    follows.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(follows)


def test_torchs_error_without_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
