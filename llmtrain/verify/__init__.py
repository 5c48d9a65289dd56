"""Proof that checkpoints are intact and that a resumed run repeats what it did."""
