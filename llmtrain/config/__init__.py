"""Configs: composed, built as checked dataclasses, and stored as `config.yaml`."""
