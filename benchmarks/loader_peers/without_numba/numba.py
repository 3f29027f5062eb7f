"""In front of the real one on the path: numba is not installed."""

raise ImportError("hidden by benchmarks/loader.py")
