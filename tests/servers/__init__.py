"""Real S3 servers for the tests: `tests.servers.plugin` has the fixtures."""
