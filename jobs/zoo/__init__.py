"""Many jobs as one run: its ledger, its rows, its report."""
