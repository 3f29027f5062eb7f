"""Layers from plain PyTorch, on CPU and GPU: norms that work under sequence parallelism, attention over packed rows.

Megatron-Core's own local parts cannot be used here. ``WrappedTorchNorm`` refuses sequence parallelism,
``LocalSpecProvider.layer_norm(rms_norm=True)`` rewrites a module global and so changes every other norm of the process,
and ``DotProductAttention`` refuses packed sequences. The linear layers are Megatron-Core's.
"""
