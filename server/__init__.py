"""The server: asks the world in, tells the world. See docs/architecture.md."""
