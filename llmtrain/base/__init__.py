"""Foundations that know nothing of language models: checks, files, formatting, the process and its device."""
