"""Secrets are found by the names of keys and variables, however they are referred to, and in addresses."""

from pathlib import Path

import pytest
import yaml

from llmtrain.cli.main import main
from llmtrain.config.compose import compose
from llmtrain.config.folders import conf_dir
from llmtrain.config.secret_values import hide, is_secret, redact, redact_arguments, without_passwords
from llmtrain.config.stored_config import ConfigError, flatten
from tests.helpers.cli import TINY

NAMES = (
    "PGPASS", "MYSQL_PWD", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "OPENAI_KEY", "APIKEY", "GITHUB_PAT",
    "TOKEN_1", "PASSPHRASE", "metrics.api_key", "metrics.options.password", "SECRET_X", "passwd",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret(name)


def test_no_key_of_ours_is_taken_for_a_secret() -> None:
    for path in conf_dir().rglob("*.yaml"):
        for key in flatten(yaml.safe_load(path.read_text())):
            assert not is_secret(key), f"{path}: {key}"
    for name in ("COMPASS", "MONKEY", "HOME", "TOKENIZERS_PARALLELISM", "author"):
        assert not is_secret(name)


@pytest.mark.parametrize(
    "reference",
    [
        "${oc.env:MY_API_KEY}",
        "${oc.env:'MY_API_KEY'}",
        '${oc.env:"MY_API_KEY"}',
        "${oc.env: MY_API_KEY }",
        "${oc.env:MY_API_KEY,default}",
        "${oc.env:ABSENT_KEY,default}",
        "a-${oc.env:MY_API_KEY}-b",
        "${oc.decode:${oc.env:MY_API_KEY}}",
        "${oc.env:${oc.env:NAME_OF_IT}}",
        "${oc.select:nothing,${oc.env:'MY_API_KEY'}}",
        "${oc.env:PGPASS}",
        "${metrics.api_key}",
        "x${oc.select:metrics.api_key}",
    ],
)
@pytest.mark.parametrize("key", ["name", "+metrics.note"])
def test_a_secret_is_refused_where_it_would_be_stored(
    monkeypatch: pytest.MonkeyPatch, key: str, reference: str
) -> None:
    for name, value in {"MY_API_KEY": "hush", "PGPASS": "hush", "NAME_OF_IT": "MY_API_KEY"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"a secret, and config.yaml would hold it") as raised:
        compose("train", ["+metrics.api_key=hush", f"{key}={reference}"])
    assert "hush" not in str(raised.value)


def test_a_variable_without_a_secret_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hush")
    monkeypatch.setenv("WHERE", "there")
    composed = compose("train", ["+metrics.api_key=${oc.env:MY_API_KEY}", "output_dir=${oc.env:WHERE}"])
    assert (composed["metrics"]["api_key"], composed["output_dir"]) == ("hush", "there")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:pw@host/db", "postgres://me:<redacted>@host/db"),
        ("redis://:p@w@host:1 and more", "redis://:<redacted>@host:1 and more"),
        ("https://ghp_abcdefghijklmnopqrstuv@github.com/x", "https://<redacted>@github.com/x"),
        ("https://x/y?token=abc&a=1", "https://x/y?token=<redacted>&a=1"),
        ("ssh://git@host", "ssh://git@host"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
    ],
)
def test_passwords_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
    assert redact({"a": [text]}) == {"a": [shown]}
    assert redact_arguments([f"+metrics.url={text}"]) == [f"+metrics.url={shown}"]


def test_messages_hide_values_of_secret_keys() -> None:
    assert hide("metrics.api_key=hush: no such key") == "metrics.api_key=<redacted>: no such key"
    assert hide("it was not stored; give it again: metrics.api_key=…") == (
        "it was not stored; give it again: metrics.api_key=…"
    )
    assert hide("neither key=value nor a flag; lr=1") == "neither key=value nor a flag; lr=1"


@pytest.mark.parametrize(
    "arguments",
    [
        ["data=text", "data.path=https://me:hush-url@host/a.txt"],
        ["data.path=https://me:hush-url@host/a.txt"],
        ["https://me:hush-url@host/a.txt"],
        ["+metrics.api_key=hush-key", "optimizer.lrr=1"],
        ["++metrics.api_key=hush-key"],
        ["pgpass=hush-key"],
        ["--password=hush-key"],
        ["pgpass", "=", "hush-key"],
        ["metrics.api_key=hush-key", "metrics.api_key=hush-keys"],
    ],
)
def test_no_message_has_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, *arguments]) == 2
    shown = capfd.readouterr()
    assert "hush" not in shown.out + shown.err
    assert "Traceback" not in shown.err
