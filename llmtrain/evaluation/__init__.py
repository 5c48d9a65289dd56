"""Evaluation of a model without training it."""
