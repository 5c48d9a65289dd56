"""Replicas on ranks, beside one process and beside the outer step of the paper in float64."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.local_sgd import sent_bytes
from llmtrain.base.world import World
from llmtrain.distributed.exchange import Sum, exchange_of
from llmtrain.distributed.local_sgd import Exchange, LocalSgd
from llmtrain.distributed.parallel import Parallel
from llmtrain.distributed.replicas import Replicas
from llmtrain.train.step import Step
from tests.distributed.sharing import Setting, make_batch, make_step, make_unit, run, worst
from tests.helpers.options import make_option

PLAIN_MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}


def options_of(**keys: Any) -> LocalSgd:
    options: LocalSgd = make_option("distributed", "local_sgd", {}, **keys)
    return options


def replicas_of(world: World, kind: str = "gpt", **keys: Any) -> Replicas:
    ranks = None if world.size == 1 else dist.group.WORLD
    return Replicas(options_of(**keys), make_unit(kind), world, ranks)


def adopted(world: World, **keys: Any) -> tuple[Replicas, Step]:
    """Replicas and their step with AdamW."""
    replicas = replicas_of(world, **keys)
    return replicas, make_step(replicas, Setting())


def move(replicas: Replicas, number: int, size: float = 0.01) -> None:
    """Change this replica's weights, another way on each rank and for each ``number``."""
    generator = torch.Generator().manual_seed(100 * number + replicas.world.rank)
    with torch.no_grad():
        for _, weight in replicas.weights():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)


def gathered(world: World, tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks."""
    found = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(found, tensor.detach().contiguous())
    return found


def train_beside_one(world: World, values: dict[str, Any]) -> dict[str, float]:
    """The worst relative differences of weights and losses from one process, with an exchange after each step."""
    setting = Setting(clipping="none", steps=4, **values)
    alone = run(Parallel(make_unit(setting.kind)), setting)
    replicas = replicas_of(world, setting.kind, sync_every=1, **PLAIN_MEAN)
    steps = iter(range(1, setting.steps + 1))
    shared = run(replicas, setting, on_step=lambda step: discard(replicas.after_update(next(steps), is_last=False)))
    return {
        "weights": worst(shared.weights, alone.weights),
        "losses": max(abs(a - b) / b for a, b in zip(shared.losses, alone.losses, strict=True)),
    }


def discard(_: object) -> None:
    pass


def follow_paper(world: World, form: str, rounds: int) -> dict[str, float]:
    """The largest difference of the common weights from Algorithm 1 in float64, relative to the largest change."""
    replicas, _ = adopted(world, exchange=Exchange(form))
    rate, momentum = replicas.options.outer_lr, replicas.options.outer_momentum
    start = {name: weight.double() for name, weight in replicas.outer_weights.items()}
    expected = dict(start)
    speed = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    norm = 0.0
    for number in range(rounds):
        move(replicas, number)
        squares = 0.0
        for name, weight in replicas.weights():
            outer = [expected[name] - own.double() for own in gathered(world, weight)]
            mean = torch.stack(outer).mean(0)
            squares += float(mean.square().sum())
            speed[name] = momentum * speed[name] + mean
            expected[name] = expected[name] - rate * (mean + momentum * speed[name])
        found = replicas.exchange()
        norm = max(norm, abs(found["outer_norm"].item() / squares**0.5 - 1))
        assert found["missed_replicas"].item() == 0
    change = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    apart = max(float((weight - expected[name]).abs().max()) for name, weight in replicas.outer_weights.items())
    own = max(float((w.detach() - replicas.outer_weights[name]).abs().max()) for name, w in replicas.weights())
    bits = [float(weight.double().sum()) for weight in replicas.outer_weights.values()]
    return {"apart": apart / change, "norm": norm, "own": own, "same": float(bits == world.gather(bits)[0])}


def exchange_with_trouble(world: World, trouble: str) -> dict[str, Any]:
    """An exchange in which rank 1 has ``trouble``: nan, still, or misses; the facts about it."""
    replicas, step = adopted(world, **PLAIN_MEAN)
    batch = make_batch(4, 0).shard(world.rank, world.size)
    step.gradients(batch)
    step.update(0.01, torch.zeros(()))
    has_trouble = world.rank == 1
    name, weight = replicas.weights()[0]
    state = step.optimizer.state[weight]
    if has_trouble and trouble == "nan":
        with torch.no_grad():
            weight.view(-1)[3] = torch.nan
        state["exp_avg"].view(-1)[3] = torch.nan
    elif has_trouble and trouble == "still":
        for key, own in replicas.weights():
            own.data.copy_(replicas.outer_weights[key])
    before, first = weight.detach().clone(), gathered(world, weight)[0]
    found = replicas.exchange(misses=has_trouble and trouble == "misses")
    common = replicas.outer_weights[name]
    facts = {
        "missed": found["missed_replicas"].item(),
        "is_first": bool((common - first).abs().max() < 1e-6),  # the mean is that of rank 0 alone
        "takes_up": torch.equal(weight, common),
        "keeps": torch.equal(weight, before),
        "finite": all(bool(value.isfinite().all()) for value in state.values()),
        "steps": state["step"].item(),
    }
    again = replicas.exchange()
    return facts | {
        "missed_next": again["missed_replicas"].item(),
        "takes_up_next": torch.equal(weight, common),
        "brings": bool((common - gathered(world, before)[1]).abs().max() < 1e-6),
    }


def nobody_counts(world: World) -> dict[str, bool]:
    """An exchange without any change: whether common weights and momentum stay."""
    replicas, step = adopted(world)
    move(replicas, 0)
    replicas.exchange()
    weight, momentum = (
        replicas.outer_weights,
        [step.optimizer.state[own]["outer_momentum"].clone() for _, own in replicas.weights()],
    )
    before = [common.clone() for common in weight.values()]
    replicas.exchange()
    return {
        "weights": all(map(torch.equal, before, weight.values())),
        "momentum": all(
            torch.equal(step.optimizer.state[own]["outer_momentum"], old)
            for (_, own), old in zip(replicas.weights(), momentum, strict=True)
        ),
        "moved": any(bool(old.abs().max() > 0) for old in momentum),
    }


def agree(world: World) -> dict[str, Any]:
    """The norm that ranks agree on, and what is left of this rank's own."""
    replicas, step = adopted(world)
    step.gradients(make_batch(4, 0).shard(world.rank, world.size))
    clipping = make_option("clipping", "norm", {}, max_norm=0.3, start_step=0)
    gradients = [weight.grad for _, weight in replicas.weights() if weight.grad is not None]
    own, largest = norm_of(gradients), max(float(gradient.abs().max()) for gradient in gradients)
    result = step.clip(clipping, 0)
    assert result.largest is not None
    clipped = norm_of(gradients) / (1.0 if result.divisor is None else result.divisor.item())
    return {
        "own": own, "norm": result.norm.item(), "own_clipped": clipped, "clipped": bool(result.clipped),
        "largest": largest, "agreed_largest": result.largest.item(),
    }  # fmt: skip


def norm_of(tensors: list[Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def swap(world: World) -> dict[str, bool]:
    """The weights that an evaluation and a sample see."""
    replicas, _ = adopted(world)
    name, weight = replicas.weights()[0]
    common = weight.detach().clone()
    move(replicas, 1)
    own = weight.detach().clone()
    with replicas.scoring():
        scored = torch.equal(weight, common)
    with replicas.whole_weights():
        sampled = torch.equal(weight, common)
    return {
        "scored": scored, "sampled": sampled, "back": torch.equal(weight, own) and not torch.equal(own, common),
        "common": torch.equal(replicas.outer_weights[name], common),
    }  # fmt: skip


def sum_of(world: World, form: str, elements: int) -> dict[str, float]:
    """The error of a sum, relative to the norm of the exact one, and the bytes that this rank has sent for it."""
    generator = torch.Generator().manual_seed(world.rank)
    flat = torch.randn(elements, generator=generator)
    exact = torch.stack(gathered(world, flat)).double().sum(0)
    assert dist.group.WORLD is not None
    total: Sum = exchange_of(Exchange(form), dist.group.WORLD)
    world.barrier()
    before = sent_bytes()
    found = total.begin(flat)()
    world.barrier()
    return {
        "error": float((found - exact).norm() / exact.norm()), "sent": sent_bytes() - before,
        "expected": total.sent_bytes(elements), "digest": float(found.double().square().sum()),
    }  # fmt: skip
