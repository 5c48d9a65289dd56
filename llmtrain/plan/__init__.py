"""Estimates of memory, time, disk and cost of a run, without training it."""
