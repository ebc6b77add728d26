"""The wire: one file per family of routes."""
