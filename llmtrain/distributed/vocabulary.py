"""The cross-entropy of a vocabulary whose rows are divided over the ranks of a tensor group.

No rank sees all logits of a token.  For each chunk of tokens the ranks agree on the largest logit, then in one
collective on the softmax denominator and the target's logit; the gradient of a rank's logits follows from these.  The
gradient of the hidden states is summed once for all tokens.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.base.constants import IGNORE
from llmtrain.distributed.tensor_group import TensorGroup
from llmtrain.kernels.row_losses import BLOCK_BYTES, Options, RowWork, VocabularyShare, exact_dtype


class VocabularyPart(VocabularyShare):
    """A rank's rows of the vocabulary: those in ``bounds[rank]`` to ``bounds[rank + 1]``."""

    def __init__(self, ranks: TensorGroup, bounds: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.first, self.end = bounds[ranks.rank : ranks.rank + 2]
        self.largest = max(end - first for first, end in pairwise(bounds))

    def row_losses(self, logits: Tensor, bias: Tensor | None, targets: Tensor, work: RowWork) -> Tensor:
        exact = exact_dtype(logits.dtype)
        rows = max(BLOCK_BYTES.get(work.device, BLOCK_BYTES["cuda"]) // (exact.itemsize * logits.shape[1]), 1)
        blocks = [slice(start, start + rows) for start in range(0, len(logits), rows)]
        highest = torch.cat([_values(logits[block], bias, work.options)[0].amax(1) for block in blocks])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.ranks.group)
        is_own = (targets >= self.first) & (targets < self.end)
        classes = torch.where(is_own, targets - self.first, 0)[:, None]
        sums = torch.empty((2, len(logits)), dtype=exact, device=logits.device)
        for block in blocks:
            x, _ = _values(logits[block], bias, work.options)
            x = x - highest[block, None]
            sums[1, block] = torch.where(is_own[block], x.gather(1, classes[block])[:, 0], 0.0)
            sums[0, block] = x.exp_().sum(1)
        denominator, of_target = self.ranks.sum(sums)
        log_sum = denominator.log()
        if work.differentiate:
            is_target = targets != IGNORE
            for block in blocks:
                x, slope = _values(logits[block], bias, work.options)
                gradient = x.sub((highest + log_sum)[block, None]).exp_()
                if work.options.z_loss:
                    gradient *= (1 + 2 * work.options.z_loss * (highest + log_sum))[block, None]
                gradient.scatter_add_(1, classes[block], -is_own[block, None].to(exact))
                if slope is not None:
                    gradient *= slope
                torch.mul(gradient, (is_target * work.factor)[block, None], out=logits[block])
        return log_sum - of_target

    def sum(self, gradient: Tensor) -> None:
        self.ranks.sum(gradient)


def _values(raw: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor | None]:
    """The logits, capped and with their bias, and the slope of the cap; at least fp32, ``raw`` stays as it is."""
    x, slope = raw.to(exact_dtype(raw.dtype)), None
    if options.softcap is not None:
        saturation = torch.tanh(x / options.softcap)
        x, slope = options.softcap * saturation, 1 - saturation.square()
    return x if bias is None else x + bias, slope
