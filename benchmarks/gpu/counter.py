"""A counter of kernel launches and of bytes moved, on tensors without data that are on "cuda".

The model of the counts:

- A launch is an aten operation that reads or writes data.  Views, ``empty`` and other changes of metadata are free.
- An operation counts once, however many kernels torch runs for it: a ``_foreach`` or fused one over all parameters,
  a matrix product that is split, an attention that begins with a preparing kernel.
- Bytes are those of its distinct inputs, read once, and of its results, written once.  A cache that saves a read is
  not modelled, nor is a kernel that reads twice.  An expanded dimension counts once; a lookup reads the rows that it
  returns; what an operation overwrites without reading is only written.
- A function under ``torch.compile`` that records no gradient (a loss's rows, an optimizer's update) counts as one
  launch that reads its inputs and writes its results once, and one more for each operation that Inductor leaves to a
  library (a matrix product, attention, a sort).  Inductor may need more kernels: this is the least.  Under autograd a
  compiled function is counted as its eager operations.
- Attention is one launch forward and one backward, whichever backend the device prefers.
- Synchronisations are operations that make the host wait: ``.item()``, ``nonzero``, copies to the host's memory.
"""

import ctypes
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

aten = torch.ops.aten
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "_unsafe_view",
        "detach", "detach_", "alias", "lift_fresh", "lift_fresh_copy", "resize_", "set_", "record_stream",
        "_reshape_alias", "view", "expand", "as_strided", "as_strided_", "t_", "transpose_", "squeeze_", "unsqueeze_",
        "is_same_size", "is_pinned", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset"}  # fmt: skip
LOOKUPS = {"embedding", "index_select", "gather", "index"}  # read of the first input what they return
SCATTERS = {"index_put_", "index_add_", "scatter_", "scatter_add_", "scatter_reduce_", "index_copy_"}
OVERWRITES = {"zero_", "fill_", "copy_", "normal_", "uniform_", "bernoulli_", "_foreach_zero_", "_foreach_copy_"}
# what Inductor leaves to a library, or to a kernel of its own
EXTERNAL = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "embedding_dense_backward", "sort", "topk", "cumsum",
            "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"}  # fmt: skip
# autocast's own lists, as far as a language model has need of them
LOW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
HIGH = ("layer_norm", "native_layer_norm", "rms_norm", "softmax.int", "log_softmax.int", "logsumexp", "nll_loss",
        "cumsum", "exp", "log", "rsqrt", "reciprocal",
        "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")  # fmt: skip
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
# c10/core/DeviceType.h and the exported table of c10/core/impl/DeviceGuardImplInterface.h
CUDA_TYPE, META_TYPE, GUARDS = 1, 14, "_ZN3c104impl26device_guard_impl_registryE"
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=150_754_820_096, multi_processor_count=132,
    shared_memory_per_block_optin=232_448, regs_per_multiprocessor=65_536, warp_size=32, gcnArchName="",
)  # fmt: skip


@dataclass
class Work:
    """The work of a stretch of operations."""

    launches: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)  # bytes, by operation
    written: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, read: int, written: int, launches: int = 1) -> None:
        """Add an operation."""
        self.launches[name] += launches
        self.read[name] += read
        self.written[name] += written


class LaunchCounter(TorchDispatchMode):
    """A counter of the operations since the last :meth:`take`."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.region = False  # within a compiled function
        self.is_finite: bool | None = True  # None: the next answer is that to "is the step to be refused?"
        self.fused = 0  # operations of the compiled function that need no library

    def take(self) -> Work:
        """Return the work since the last call."""
        done, self.work = self.work, Work()
        return done

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.prim.device.default:  # torch's C++ asks; without a GPU its autograd refuses "cuda"
            return torch.device("meta")
        if kwargs.get("device") == torch.device("meta"):  # what it does with the answer
            kwargs["device"] = torch.device("cuda", 0)
        name = function._schema.name.split("::")[-1]
        if function is aten._local_scalar_dense.default:  # .item(): there is no data to read
            return self.answer(args[0])
        result = function(*args, **kwargs)
        if function.namespace in ("prim", "profiler") or name in FREE or function.is_view:
            return result
        if waits(name, result, args):
            self.work.waits[name] += 1
        if self.region and name not in EXTERNAL:
            self.fused += 1
        else:
            self.work.add(name, *traffic(function, name, args, kwargs, result))
        return result

    def answer(self, tensor: Tensor) -> bool | int | float:
        """The value of a tensor without data."""
        if tensor.device.type == "cuda":
            self.work.waits["item"] += 1
            if self.is_finite is None:
                self.is_finite = True
                return 0.0
        return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.dtype.is_floating_point else 1)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, counted as if compiled."""

        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if self.region or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
                return function(*args, **kwargs)
            versions = [tensor._version for tensor in inputs]
            self.region, self.fused = True, 0
            try:
                result = function(*args, **kwargs)
            finally:
                self.region = False
            changed = [tensor for tensor, before in zip(inputs, versions, strict=True) if tensor._version != before]
            known = {tensor.untyped_storage()._cdata for tensor in inputs}
            made = [t for t in tree_iter(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
            if self.fused:
                name = f"compiled {getattr(function, '__name__', type(function).__name__)}"
                self.work.add(name, total_bytes(inputs), total_bytes(changed) + total_bytes(made))
            return result

        return run


def waits(name: str, result: Any, args: Any) -> bool:
    """Return whether the host waits for the operation."""
    if name in ("nonzero", "_unique2", "masked_select"):
        return True
    if name not in ("_to_copy", "copy_"):
        return False
    source = args[1] if name == "copy_" else args[0]
    return result.device.type == "cpu" and source.device.type == "cuda"


def num_bytes(tensor: Tensor) -> int:
    """The bytes of the distinct elements of ``tensor``."""
    elements = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 else min(size, 1)
    return elements


def total_bytes(tensors: list[Tensor]) -> int:
    """The bytes of the tensors, each once."""
    return sum(num_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def traffic(function: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """The bytes that an operation reads, and writes."""
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
    results = [t for t in tree_iter(result) if isinstance(t, Tensor)]
    result_bytes = total_bytes(results)
    read: list[Tensor] = []
    changed: list[Tensor] = []
    read_bytes = 0
    for position, argument in enumerate(function._schema.arguments):
        tensors = [t for t in tree_iter(given.get(argument.name)) if isinstance(t, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if name.startswith("_fused_adam") and argument.name == "grads":
            is_written = given.get("grad_scale") is not None  # unscaled in place
        if is_written:
            changed += tensors
        if name in LOOKUPS and position == 0:
            read_bytes += min(total_bytes(tensors), result_bytes)
        elif not (is_written and (argument.kwarg_only or name in OVERWRITES)):  # out=, or overwritten
            read += tensors
    if name in SCATTERS:  # the rows that are added, and what they are added to
        rows = total_bytes(read[1:])
        return rows + min(total_bytes(read[:1]), rows), min(total_bytes(changed), rows)
    known = {id(tensor) for tensor in (*read, *changed)}
    made = [tensor for tensor in results if id(tensor) not in known]
    return read_bytes + total_bytes(read), total_bytes(changed) + total_bytes(made)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Scaled dot-product attention as on a GPU: flash attention; with a mask or in fp32 the memory-efficient one."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class Autocast:
    """The casts of ``torch.autocast("cuda")``, which torch's C++ leaves out because the tensors are not really there.

    A weight is cast once within a context, as torch's cache has it.
    """

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}
        with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced is the purpose
            for name in (*LOW, *HIGH):
                packet, _, overload = name.partition(".")
                function = getattr(getattr(aten, packet), overload or "default")
                self.library.impl(name, self._kernel(function, is_low=name in LOW), "AutocastCUDA")

    def clear(self) -> None:
        """Drop the cast weights: the context is left."""
        self.weights.clear()

    def close(self) -> None:
        """Give torch its own kernels back."""
        self.library._destroy()

    def _kernel(self, function: Any, *, is_low: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype("cuda") if is_low else torch.float32
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
                return function(*args, **kwargs)

        return run

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value, value.to(dtype)
        return self.weights[id(value)][1]


def allow_fake_cuda() -> None:
    """Let a build of torch without CUDA, some of whose C++ asks for the guard of CUDA devices, take that of "meta"."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, GUARDS)
    if guards[CUDA_TYPE] is None:
        guards[CUDA_TYPE] = guards[META_TYPE]


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Make tensors without data on "cuda" within the context, as if an H200 were there, and count the work on them."""
    counter = LaunchCounter()

    def compile_function(function: Any = None, **options: Any) -> Any:
        return compile_function if function is None else counter.compiled(function)

    allow_fake_cuda()
    with ExitStack() as stack:
        autocast = Autocast()
        stack.callback(autocast.close)
        for target, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.get_device_name": lambda *_: H200.name,
            "torch.cuda.get_device_properties": lambda *_: H200,
            "torch.cuda.get_device_capability": lambda *_: (H200.major, H200.minor),
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.synchronize": lambda *_: None,
            "torch.clear_autocast_cache": autocast.clear,
            "torch.compile": compile_function,
            "torch.nn.functional.scaled_dot_product_attention": attend,
        }.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counter)
        # in this thread: a mode does not see autograd's own threads
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield counter
