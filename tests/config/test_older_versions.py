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
