"""A job that outlives whoever asked for it: its digest, its record in the store, its way onto a cluster."""
