"""Metrics: pure functions from predictions and references to numbers in [0, 1]; each has golden values in its test."""
