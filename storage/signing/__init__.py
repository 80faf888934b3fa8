"""Signed metadata (The Update Framework): what is signed, with which keys, under which root."""
