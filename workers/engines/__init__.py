"""Versions made ready for inference engines: a network traced to an engine's graph, and the layout of its weights."""
