"""The device decides: signals of the machine, a policy over them, and the level that a running engine is told."""
