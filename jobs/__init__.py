"""What a person asks for: specs, plans, the driver, the command line."""
