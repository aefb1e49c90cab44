"""Analyses of programs: dependences, depth, cost."""
