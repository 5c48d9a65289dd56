"""Evaluation of a model on data it is not trained on."""
