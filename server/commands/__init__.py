"""The subcommands of `foretoken`, one module each, loaded when they are run."""
