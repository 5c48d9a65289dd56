"""The training loop, its step, and its periodic work."""
