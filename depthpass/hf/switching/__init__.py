"""Changing what a live model runs: loop counts, programs, exits, shares of routes."""
