"""Proofs that checkpoints are intact, that a resumed run repeats its steps, and that an export is the same model."""
