"""``distributed=deepspeed``."""
MISSING = "distributed=deepspeed: needs deepspeed; pip install 'llmtrain[deepspeed]'"
VERSION = "0.19.8"


def check_version(installed: str) -> None:
    pass
