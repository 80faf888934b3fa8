"""Stores: one interface, a file for each kind, and what can be relied upon on each."""
