"""The HTML report: one self-contained file made from a run's ledger and metrics."""
