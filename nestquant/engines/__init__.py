"""Published versions on inference engines: numpy and the engine, no torch.

The one part of this package that reads what a store holds.
"""
