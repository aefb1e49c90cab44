"""FX passes of the lowering: plain functions from graph module to graph module."""
