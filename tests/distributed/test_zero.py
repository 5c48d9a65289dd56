"""Ranks that share a unit by DeepSpeed's ZeRO give the numbers of one process."""

import importlib.util
from typing import Any

import pytest
import torch

from llmtrain.base.world import World
from llmtrain.distributed.zero import Zero
from tests.distributed.sharing import Setting, make_batch, make_step, make_unit, run, share
from tests.distributed.test_data_parallel import check
from tests.distributed.test_sharing import not_finite, sample, score, skipped_by
from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'llmtrain[deepspeed]'",
)
MODES = ("zero1", "zero2", "zero3")


@pytest.mark.parametrize(
    ("mode", "setting"),
    [
        ("zero1", {}),
        ("zero2", {"kind": "llama", "optimizer": "lion", "clipping": "per_parameter"}),
        ("zero2", {"kind": "gpt lora bf16", "micro_batch_size": 1}),  # packed weights
        ("zero3", {"optimizer": "adamw_bf16", "clipping": "value"}),
        ("zero3", {"kind": "gpt lora", "recomputation": "full"}),
        ("zero3", {"sequences": 1, "targets": "all", "optimizer": "sgd"}),  # a rank has none
    ],
    ids=str,
)
def test_ranks_train_as_one_process(two: Ranks, mode: str, setting: dict[str, Any]) -> None:
    check(two, mode, **setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("zero2", {"parameter_alignment": True, "contiguous_gradients": False}),
        ("zero2", {"overlap_comm": True, "reduce_scatter": False, "reduce_bucket_size": 500}),
        ("zero1", {"overlap_comm": True, "allgather_bucket_size": 64}),
        ("zero3", {"overlap_comm": False, "sub_group_size": 1000, "stage3_param_persistence_threshold": 0}),
        ("zero3", {"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}),
    ],
    ids=str,
)
def test_keys_of_the_json_change_no_number(two: Ranks, mode: str, options: dict[str, Any]) -> None:
    check(two, mode, options, micro_batch_size=1)


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_scores_are_those_of_one_process(two: Ranks, mode: str) -> None:
    assert max(max(found) for found in two.run(score, mode, "fp32")) < 1e-5


@pytest.mark.parametrize("mode", ["zero1", "zero3"])
def test_one_rank_samples_alone_between_steps(two: Ranks, mode: str) -> None:
    assert all(all(found) for found in two.run(sample, mode, False))


def test_one_rank_samples_before_the_first_step(two: Ranks) -> None:
    assert all(all(found) for found in two.run(sample, "zero3", True))


@pytest.mark.parametrize("mode", MODES)
def test_nan_on_one_rank_is_known_to_all(two: Ranks, mode: str) -> None:
    assert two.run(not_finite, mode, "norm") == [[True, True]] * 2


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_skipped_step_changes_nothing(two: Ranks, mode: str) -> None:
    assert two.run(skipped_by, mode, "adamw") == [True, True]


def describe(world: World, mode: str, kind: str) -> dict[str, Any]:
    """The fragments of this rank beside the weights that they are of, and counts of the whole."""
    alone, parallel = make_unit(kind), share(make_unit(kind), world, mode)
    assert isinstance(parallel, Zero)
    expected = dict(alone.named_weights())
    view = parallel.fragments
    same = [
        torch.equal(view.own_part(name, expected[name].detach()), fragment.local.detach())
        and fragment.whole == tuple(expected[name].shape)
        for name, fragment in view.fragments.items()
    ]
    units = (alone, parallel.unit)
    return {
        "names": [name for name, _ in view.named_weights()] == list(expected),
        "trained": [name for name, _ in parallel.weights()] == [name for name, _ in alone.trained_weights()],
        "values": all(same),
        "elements": sum(len(fragment.local) for fragment in view.fragments.values()),
        "divided": sum(expected[name].numel() for name in view.fragments),
        "all": len(view.fragments) == len(expected),
        "parameters": len({unit.count_parameters() for unit in units}) == 1,
        "operations": len({unit.flops_per_token(length) for unit in units for length in (7,)}) == 1,
        "memory": sum(parameter.numel() for parameter in parallel.unit.parameters()),
    }


@pytest.mark.parametrize(("mode", "kind"), [("zero2", "gpt"), ("zero3", "gpt lora"), ("zero1", "gpt lora")])
def test_ranks_hold_each_trained_element_once(two: Ranks, mode: str, kind: str) -> None:
    both = two.run(describe, mode, kind)
    for found in both:
        assert all(found[key] for key in ("names", "trained", "values", "parameters", "operations")), found
        assert found["all"] == (mode == "zero3" or "lora" not in kind)
        assert found["elements"] == pytest.approx(found["divided"] / 2, rel=0.05)
    assert sum(found["elements"] for found in both) == both[0]["divided"]
    assert (both[0]["memory"] < 0.1 * both[0]["divided"]) == (mode == "zero3")


def load(world: World, mode: str) -> list[bool]:
    """True if weights that are written into the fragments are those of the next pass, before and after training."""
    parallel = share(make_unit("gpt"), world, mode)
    batch, found = make_batch(2, 0), []
    for _ in range(2):
        alone = make_unit("gpt")
        alone.load_weights({name: 0.5 * w for name, w in make_unit("gpt").weights_state().items()}, strict=False)
        expected = dict(alone.named_weights())
        with torch.no_grad():
            for name, weight in parallel.weights():
                weight.copy_(parallel.trainable.own_part(name, expected[name]))  # type: ignore[attr-defined]
            parallel.use_loaded()
            with parallel.scoring():
                scored = parallel.unit.score(batch)[0]["next_token"]
            found.append(torch.allclose(scored, alone.score(batch)[0]["next_token"], rtol=1e-6))
        run(parallel, Setting(steps=1))
    return found


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_loaded_weights_are_used(two: Ranks, mode: str) -> None:
    assert two.run(load, mode) == [[True, True]] * 2


def dropped(world: World, mode: str) -> bool:
    """True if gradients that are dropped, as after a rehearsal, leave nothing to the step after."""
    found = []
    for rehearses in (False, True):
        parallel = share(make_unit("gpt"), world, mode)
        step = make_step(parallel, Setting())
        if rehearses:
            step.gradients(make_batch(4, 7).shard(world.rank, 2))
            step.drop_gradients()
        step.gradients(make_batch(4, 0).shard(world.rank, 2))
        found.append([weight.grad.clone() for _, weight in step.weights if weight.grad is not None])
    return all(map(torch.equal, *found))


@pytest.mark.parametrize("mode", MODES)
def test_dropped_gradients_are_forgotten(two: Ranks, mode: str) -> None:
    assert two.run(dropped, mode) == [True, True]
