"""What training loops use: callbacks, the ledger of FLOPs, thresholds set on data."""
