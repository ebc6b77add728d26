"""Draft tables and heads: corpora, answers of the target, losses, checkpoints. Nothing that serves imports it."""
