"""A run from its config to its end: assembly, session, resume, summary."""
