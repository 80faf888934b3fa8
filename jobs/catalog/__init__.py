"""A store as a static site: its models, their versions, and what was measured of them."""
