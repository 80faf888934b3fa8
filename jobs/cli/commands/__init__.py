"""The command line's commands, by what they touch: jobs, the device's cache, the store."""
