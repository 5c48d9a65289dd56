"""Measurements of this program beside others: ``python -m benchmarks --help``; README.md says more."""
