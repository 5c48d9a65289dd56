"""The verbs: one module each, with ``main(config, invocation) -> exit status``."""
