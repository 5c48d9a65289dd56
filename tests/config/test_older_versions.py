"""Stored configs of older versions keep their meaning."""

from typing import Any

from llmtrain import Run
from llmtrain.config.older_versions import FORMER, complete
from llmtrain.config.run_config import RunConfig
from llmtrain.config.stored_config import to_plain


def test_a_stored_config_without_newer_keys_gets_the_former_rules() -> None:
    for option, path in (("text", "a.txt"), ("shards", "a.bin")):
        run: RunConfig = Run.compose("model=tiny", f"data={option}", f"data.path={path}")
        stored: dict[str, Any] = to_plain(run)
        former = FORMER[stored["data"]["_target_"]]
        assert {key: stored["data"][key] for key in former} != former
        for key in former:
            del stored["data"][key]
        assert {key: complete(stored)["data"][key] for key in former} == former


def test_a_stored_precision_keeps_its_residual_stream_and_an_older_one_that_of_its_time() -> None:
    for option in ("auto", "bf16", "fp8"):
        run: RunConfig = Run.compose("model=tiny", f"precision={option}", "precision.residual=bf16")
        stored: dict[str, Any] = to_plain(run)
        assert RunConfig.from_config(complete(stored)).precision.has_low_residual
        del stored["precision"]["residual"]
        assert not RunConfig.from_config(complete(stored)).precision.has_low_residual
