"""Checks of the learning rate: its schedule, its size, and the batch for which it was chosen."""

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmtrain.base.format import counted, percent
from llmtrain.base.options import option_name
from llmtrain.config.build import build
from llmtrain.config.compose import compose
from llmtrain.lint.case import Case, Finding, error, warning
from llmtrain.optimizer import OptimizerConfig
from llmtrain.optimizer.adafactor import Adafactor
from llmtrain.optimizer.adam import Adam
from llmtrain.optimizer.lion import Lion
from llmtrain.optimizer.muon import AdjustLR, Muon
from llmtrain.optimizer.sgd import SGD
from llmtrain.schedule.linear_warmup_cosine_lr import LinearWarmupCosineLR
from llmtrain.weights.scratch import Scratch

log = logging.getLogger(__name__)
SAMPLED_STEPS = 1000
NEXT_TO_NOTHING = 1e-3  # of the peak

# Peak learning rates of AdamW by number of parameters.
ADAMW = {
    4e4: 1.8e-3,  # Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, appendix D.6: 0.003239 - 0.0001395 ln N
    1e7: 1e-3,  # nanoGPT, config/train_shakespeare_char.py
    1.25e8: 6e-4,  # from here on Brown et al. 2020 (GPT-3), https://arxiv.org/abs/2005.14165, table 2.1
    3.5e8: 3e-4,
    7.6e8: 2.5e-4,
    1.3e9: 2e-4,
    2.7e9: 1.6e-4,
    6.7e9: 1.2e-4,
    1.3e10: 1e-4,
    1.75e11: 6e-5,
}
LION = 1 / math.sqrt(3 * 10)  # times AdamW's: 3 to 10 times smaller, Chen et al. 2023, section 5
MUON = 0.02  # with adjust_lr_fn=original: Jordan et al. 2024
ADAFACTOR = 1e-2  # relative to the size of a parameter: Shazeer & Stern 2018, algorithm 6; PaLM
SGD_TOTAL = 1.0  # times 1 - momentum: 0.1 with a momentum of 0.9, He et al. 2016, https://arxiv.org/abs/1512.03385
EMBEDDINGS = 0.2  # the highest usual rate of AdamW for embeddings beside Muon: nanochat, scripts/base_train.py
FACTOR = 10  # a rate may be so many times the usual one, or that part of it
FINE_TUNING = 100  # … and this part of that for weights that have been trained before

CHANGES_BATCH = re.compile(r"accumulation(?!\.micro_batch_size).*|data\.sequence_length|model|model\.context_length")
NAMES_INPUT = re.compile(r"(data|tokenizer|weights|lora|objective|hydra\.searchpath)\b")


def schedule(case: Case) -> Iterator[Finding]:
    """A learning rate that never reaches its peak, or vanishes long before the end of the run."""
    rule, steps, peak = case.run.schedule, case.max_steps, case.run.optimizer.lr
    sampled = np.unique(np.linspace(0, steps - 1, min(steps, SAMPLED_STEPS)).astype(int)).tolist()
    rates = np.array([rule(step, peak=peak, total=steps) for step in sampled])
    warmup = rule.warmup(steps)
    highest = float(rates.max())
    if warmup >= steps:
        given_steps = getattr(rule, "warmup_steps", None)
        key = "schedule.warmup_ratio" if given_steps is None else "schedule.warmup_steps"
        value = getattr(rule, key.removeprefix("schedule."), warmup)
        better = steps // 20 if given_steps is not None else 0.05
        intended = getattr(rule, "init_lr", peak)
        if highest <= NEXT_TO_NOTHING * intended:
            yield error(
                key,
                f"{key}={value}: the run ends after {counted(steps, 'step')}, within the warm-up, with a learning "
                f"rate of at most {highest:.2g} instead of {intended:g}: it would learn next to nothing; "
                f"{key}={better}, or more loop.max_steps",
            )
        else:
            yield warning(
                key,
                f"{key}={value}: the warm-up takes all {counted(steps, 'step')} of the run: the learning rate reaches "
                f"{highest:.2g} of {intended:g} and never decays; {key}={better}, or more loop.max_steps",
            )
    elif highest == 0:
        yield error(
            "schedule",
            f"schedule={option_name(rule)}: the learning rate is 0 in every step, nothing would be learnt; give it a "
            "peak above 0",
        )
    elif (share := float((rates[warmup <= np.array(sampled)] < NEXT_TO_NOTHING * highest).mean())) > 0.5:
        yield warning(
            "schedule",
            f"schedule={option_name(rule)}: for {percent(share)} of the run the learning rate is below a thousandth of "
            f"its peak, {highest:g}, so that these steps change almost nothing; a slower decay, or fewer "
            "loop.max_steps",
        )


def learning_rate(case: Case) -> Iterator[Finding]:
    """A peak far from what others take for such a model and optimizer."""
    parameters = case.unit.model.num_parameters()
    is_new = isinstance(case.run.weights, Scratch) and not case.is_resumed
    lowest = 1 / FACTOR if is_new else 1 / (FACTOR * FINE_TUNING)
    for key, rate, usual, highest in peaks(case, parameters):
        if rate and not lowest * usual <= rate <= highest:
            danger = "training may be unstable" if rate > usual else "training may hardly move"
            yield warning(
                key,
                f"{key}={rate:g}: {far(rate / usual)} what is usual with optimizer={option_name(case.run.optimizer)} "
                f"and {parameters:,} parameters, about {usual:.2g}: {danger}; {key}={usual:.2g}",
            )


def peaks(case: Case, parameters: int) -> Iterator[tuple[str, float, float, float]]:
    """Each peak learning rate of the run: its key, its value, the usual value, and the highest without a warning."""
    optimizer, rule = case.run.optimizer, case.run.schedule
    usual = usual_rate(optimizer, parameters)
    if usual is not None:
        if isinstance(rule, LinearWarmupCosineLR):
            yield "schedule.init_lr", rule.init_lr, usual, usual * FACTOR
        else:
            yield "optimizer.lr", optimizer.lr, usual, usual * FACTOR
    if isinstance(optimizer, Muon) and (optimizer.adamw_lr != optimizer.lr or usual == MUON):
        usual = adamw_rate(parameters)
        highest = usual * FACTOR if optimizer.adamw_lr == optimizer.lr else EMBEDDINGS
        yield "optimizer.adamw_lr", optimizer.adamw_lr, usual, highest


def usual_rate(optimizer: OptimizerConfig, parameters: int) -> float | None:
    """The usual peak learning rate; None for an optimizer of a plug-in."""
    match optimizer:
        case Muon(adjust_lr_fn=AdjustLR.original):
            return MUON
        case Adam() | Muon():
            return adamw_rate(parameters)
        case Lion():
            return adamw_rate(parameters) * LION
        case Adafactor():
            return ADAFACTOR
        case SGD(momentum=momentum):
            return SGD_TOTAL * (1 - momentum)
    return None


def adamw_rate(parameters: int) -> float:
    """The usual peak of AdamW: between the points of the table along straight lines in the logarithms."""
    sizes, rates = np.log(list(ADAMW)), np.log(list(ADAMW.values()))
    return float(np.exp(np.interp(math.log(max(parameters, 1)), sizes, rates)))


def far(ratio: float) -> str:
    """``ratio`` in words."""
    return f"{ratio:,.0f} times" if ratio > 1 else f"1/{1 / ratio:,.0f} of"


def batch_of_recipe(case: Case) -> Iterator[Finding]:
    """A batch of another size than the recipe's, at the recipe's learning rate; in tokens, or in unpacked examples."""
    recipe = case.given.get("experiment")
    if not recipe or "optimizer.lr" in case.given or "optimizer" in case.given:
        return
    changed = [key for key in case.given if CHANGES_BATCH.fullmatch(key)]
    if not changed:
        return
    kept = [o for o in case.overrides if NAMES_INPUT.match(o) and not o.startswith("data.sequence_length=")]
    try:
        values = compose("train", [f"experiment={recipe}", *kept])
        accumulation: Any = build(values["accumulation"], object, path="accumulation", plugins=case.run.plugins)
    except Exception as problem:  # Hydra's errors have no common class here; a comparison is not worth the run
        log.info("the batch is not compared with the recipe %s: %s", recipe, problem)
        return
    intended, taken = accumulation.batch_size_at(0, 0), case.run.accumulation.batch_size_at(0, 0)
    unit = "sequences"
    if case.run.data.gives == "text" or case.run.data.packs:  # else a row is as long as its example
        unit, intended = "tokens", intended * values["data"]["sequence_length"]
        taken *= case.run.data.sequence_length
    ratio = taken / intended
    if 0.8 <= ratio <= 1.25:
        return
    rate = case.run.optimizer.lr
    # Goyal et al. 2017, https://arxiv.org/abs/1706.02677; for Adam and its kin Malladi et al. 2022, arXiv:2205.10287
    scaled = rate * (ratio if isinstance(case.run.optimizer, SGD) else math.sqrt(ratio))
    key = case.batch_key if any(key.startswith("accumulation") for key in changed) else "data.sequence_length"
    yield warning(
        key,
        f"{key}: a step takes {taken:,} {unit}, in the recipe {recipe} {intended:,}, and optimizer.lr={rate:g} was "
        f"chosen for those; optimizer.lr={scaled:.2g} goes with this batch; to keep it: optimizer.lr={rate:g}",
    )
