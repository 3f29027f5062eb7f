"""Metrics: pure functions from predictions and references to numbers, tested against golden values."""
