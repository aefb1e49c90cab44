"""One experiment per file: its problem, its arms and what is measured."""
