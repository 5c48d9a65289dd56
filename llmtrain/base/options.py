"""Names of options."""


def option_name(component: object) -> str:
    """The name of a component's option, as in ``optimizer=adamw``: that of its module."""
    return type(component).__module__.rpartition(".")[2]


def option_of_target(target: str) -> str:
    """The option that a stored ``_target_`` names: ours by their modules, those of plugins by their classes."""
    parts = target.split(".")
    return parts[-2] if parts[0] == "llmtrain" and len(parts) > 2 else parts[-1]
