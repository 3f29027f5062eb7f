"""Qwen-VL, trained through its three stages on 3D-parallel Megatron-Core."""

__version__ = "0.1.0"
