"""Rotary positions in ``config.json``: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``."""

import math
from typing import Any

from llmtrain.hf.config_json import ConfigJson
from llmtrain.model.layers.rotary import BETA_FAST, BETA_SLOW, Scaling
from llmtrain.model.llama import LlamaConfig

DEFAULT_THETA = 10000.0
KEYS = {  # our key, without rope_: their key
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}
CHANGES = ("rope_theta", "rope_scaling", *(f"rope_{key}" for key in KEYS))


def read_rope(config: ConfigJson, positions: int) -> dict[str, Any]:
    """The keys ``rope_*`` of a :class:`LlamaConfig`; ``positions``: ``max_position_embeddings``."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    top = config.get("original_max_position_embeddings")
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        config.refuse(key, "only one set of rotary positions for all layers is supported")
    values = {name: value for name, value in found.items() if value is not None}
    theta = values.pop("rope_theta", None) or config.number("rope_theta", DEFAULT_THETA)
    config.get("rope_theta")
    kind = values.pop("rope_type", values.get("type", "default"))
    values.pop("type", None)
    if values.pop("partial_rotary_factor", 1) != 1:
        config.refuse(key, "partial_rotary_factor must be 1: rotary positions apply to all channels here")
    scaling = Scaling.none if kind == "default" else Scaling.__members__.get(str(kind), Scaling.none)
    if kind not in ("default", *(member.name for member in Scaling if member is not Scaling.none)):
        known = ", ".join(["default", *(member.name for member in Scaling if member is not Scaling.none)])
        config.refuse(key, f"rope_type {kind} is not supported; the supported ones are: {known}")
    needed = {
        Scaling.none: (), Scaling.linear: ("factor",), Scaling.dynamic: ("factor",),
        Scaling.llama3: tuple(KEYS.values()), Scaling.yarn: ("factor", "original_max_position_embeddings"),
    }[scaling]  # fmt: skip
    original = "original_max_position_embeddings"
    if original in needed:
        values[original] = top or values.get(original, positions)
    elif scaling is Scaling.dynamic and values.pop(original, positions) != positions:
        config.refuse(key, f"{original} must be max_position_embeddings={positions}, which transformers uses")
    if scaling is Scaling.none:
        values.pop("factor", None), values.pop(original, None)  # transformers ignores them too
    if missing := [name for name in needed if name not in values]:
        config.refuse(key, f"{missing[0]} is missing")
    _check_rest(config, key, scaling, {name: value for name, value in values.items() if name not in needed}, values)
    ours: dict[str, Any] = {f"rope_{ours}": values.get(theirs) if theirs in needed else None
                            for ours, theirs in KEYS.items()}  # fmt: skip
    if scaling is Scaling.dynamic:
        ours["rope_original_context_length"] = positions
    for name, value in (("rope_theta", theta), *ours.items()):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            config.refuse(key, f"{name} must be a positive number")
    for name in ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
        ours[name] = None if ours[name] is None else float(ours[name])
    return {"rope_theta": float(theta), "rope_scaling": scaling, **ours}


def _check_rest(config: ConfigJson, key: str, scaling: Scaling, rest: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse settings that would give other angles or magnitudes than those computed here."""
    if scaling is Scaling.yarn:
        magnitude = 0.1 * math.log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0
        if rest.get("mscale") == rest.get("mscale_all_dim"):  # they cancel out; without either it is as here
            if rest.pop("mscale", None):
                magnitude = 1.0
            rest.pop("mscale_all_dim", None)
        ours = {"attention_factor": 0.1 * math.log(max(values["factor"], 1)) + 1.0, "beta_fast": BETA_FAST,
                "beta_slow": BETA_SLOW, "truncate": True}  # fmt: skip
        if "attention_factor" not in rest and magnitude != ours["attention_factor"]:
            config.refuse(key, "mscale and mscale_all_dim are not supported")
        rest = {name: value for name, value in rest.items()
                if name not in ours or not math.isclose(value, ours[name], rel_tol=1e-6)}  # fmt: skip
    if rest:
        name = next(iter(rest))
        config.refuse(key, f"{name} is not supported for rope_type {scaling.name}")


def write_rope(config: LlamaConfig) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and ``max_position_embeddings``, for all versions of transformers."""
    scaling: dict[str, Any] | None = None
    positions = config.context_length
    if config.rope_scaling is not Scaling.none:
        scaling = {"rope_type": config.rope_scaling.name}
        for ours, theirs in KEYS.items():
            value = getattr(config, f"rope_{ours}")
            if value is not None and not (config.rope_scaling is Scaling.dynamic and ours == "original_context_length"):
                scaling[theirs] = value
    if config.rope_scaling is Scaling.dynamic:  # scaling starts beyond max_position_embeddings
        assert config.rope_original_context_length is not None
        positions = config.rope_original_context_length
    return {"max_position_embeddings": positions, "rope_theta": config.rope_theta, "rope_scaling": scaling}
