"""The work on a Ray cluster; nothing outside this folder imports ray."""
