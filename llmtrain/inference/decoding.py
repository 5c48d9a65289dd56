"""The logits after each token of a sequence, with a cache; on a GPU one token is one launch of a recorded pass.

A small model's pass of one token is a thousand kernels of a few microseconds each: the host takes longer to launch
them than the GPU to run them.  So the pass is recorded as a CUDA graph, and recorded again every 256 tokens, when more
keys are read.  Where recording fails, this process decodes without, and says so once.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llmtrain.model import LanguageModel
from llmtrain.model.layers.kv_cache import FixedShape

STEP = 256  # keys: a recorded pass reads a multiple of them
PAYS_FROM_TOKENS = 8  # recording takes as long as a few passes

Pass = Callable[[], Tensor]
Recorder = Callable[[Pass], Pass]

log = logging.getLogger(__name__)


class GraphRecorder:
    """The recorder of passes as CUDA graphs; once it has failed it is not used again in this process."""

    def __init__(self) -> None:
        self.has_failed = False
        self._last: torch.cuda.CUDAGraph | None = None  # keeps its memory for the next one: it is never launched again

    def __call__(self, function: Pass) -> Pass:
        """Return a function that launches the kernels of ``function`` and returns the same tensor each time.

        Whatever ``function`` reads and writes must keep its place in memory.  Raises what CUDA and torch raise.
        """
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # loads kernels and makes workspaces, which cannot be recorded
            # the loader's and the saver's threads may allocate meanwhile: only this thread's calls are restricted
            with _no_garbage_collection():
                graph.capture_begin(
                    pool=None if self._last is None else self._last.pool(), capture_error_mode="thread_local"
                )
                try:
                    result = function()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # that the recording is not valid
                        graph.capture_end()
                    raise
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._last = graph

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


RECORDER = GraphRecorder()


class Decoder:
    """A model that reads one sequence, piece by piece."""

    def __init__(
        self,
        model: LanguageModel,
        dtype: torch.dtype,
        *,
        recorder: Recorder | None = None,
        report: Callable[[str], None] = log.warning,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(1, dtype)
        self.recorder = recorder  # None: passes are not recorded
        self.report = report  # called with a message where recording fails
        self._pass: Pass | None = None  # recorded, for the shape that the cache has

    @property
    def is_full(self) -> bool:
        """True if the context has no room for another token."""
        return self.cache.length + 1 > self.cache.capacity

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read ``ids``, which continue the sequence; return the logits ``(vocab_size,)`` of the token after them.

        They are valid until the next call.
        """
        with _without_cudnn(self.device):
            if len(ids) == 1 and self.cache.length and self.recorder is not None:
                logits = self._replay(ids[0], self.recorder)
                if logits is not None:
                    return logits
            self.cache.fix(None)
            if len(ids) == 1:  # no copy from the host, which would wait for the device
                return self._logits(torch.full((1, 1), ids[0], device=self.device))
            return self._logits(torch.tensor([list(ids)], device=self.device))

    def _logits(self, ids: Tensor) -> Tensor:
        hidden = self.model.hidden(ids, self.cache)[0, -1]
        return self.model.logits(hidden)[: self.model.vocab_size]

    def _replay(self, token: int, recorder: Recorder) -> Tensor | None:
        """Read ``token`` by the recorded pass; None if there is none."""
        cache = self.cache
        end = cache.length + 1
        fixed = cache.fixed
        if fixed is None or end > fixed.seen:
            seen = min(-(-end // STEP) * STEP, cache.capacity)
            if not self.model.can_fix_shapes(seen):
                return None
            self._pass = None
            fixed = FixedShape(torch.zeros(1, dtype=torch.int64, device=self.device), seen)
            self._token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            cache.fix(fixed)
        fixed.position.fill_(cache.length)
        self._token.fill_(token)
        if self._pass is None:
            try:
                self._pass = recorder(lambda: self._logits(self._token))
            except Exception as error:  # any: a sample must not end a training run
                self.recorder = None
                if isinstance(recorder, GraphRecorder):
                    recorder.has_failed = True
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                self.report(f"one token at a time without a CUDA graph, several times slower: {reason}")
                return None
        logits = self._pass()
        cache.length += 1
        return logits


def graph_recorder(device: torch.device, tokens: int) -> Recorder | None:
    """The recorder for a text of ``tokens`` tokens; None where recording does not pay or has failed."""
    return RECORDER if device.type == "cuda" and tokens >= PAYS_FROM_TOKENS and not RECORDER.has_failed else None


@contextlib.contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Context without cuDNN's attention, which plans each new number of keys for 25 ms and more.

    For a pass over all layers, as a pass is not so short that its two calls count.
    """
    before = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if before:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if before:
            torch.backends.cuda.enable_cudnn_sdp(True)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Context in which Python frees no tensors of elsewhere: freeing may call what cannot be recorded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
