"""With CUDA graphs the plan counts the gradients as held between the steps."""

import pytest
import torch

from llmtrain import Run
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.trace import Category, trace_step


@pytest.mark.parametrize("graphs", [False, True])
def test_gradients_are_held_with_cuda_graphs_alone(graphs: bool) -> None:
    cpu = torch.device("cpu")
    run = Run.compose("model=tiny", "tokenizer=byte", "precision=fp32", "accumulation.micro_batch_size=2",
                      "runtime.compile=true", f"runtime.cuda_graphs={str(graphs).lower()}")  # fmt: skip
    trace = trace_step(Blueprint(run, 257, run.precision.build(cpu), 4))
    held, *_, last = trace.timeline()
    weights = int(held[-1][Category.weights])
    assert abs(int(held[-1][Category.gradients]) - graphs * weights) < 0.01 * weights  # buffers have no gradient
    assert last[-1][Category.gradients] >= held[-1][Category.gradients]
