"""Foundations without any knowledge of language models: checks, files, formatting, the process and its device."""
