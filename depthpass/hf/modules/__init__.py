"""The module tree of a model: its parameters and where they are, hooks, and what changes make a capture stale."""
