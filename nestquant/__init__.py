"""The method: pure functions on tensors, and the modules that run part-bit or full-bit.

Importing the package itself imports nothing; `config` and `packing` need no torch.
"""
