"""Tool calls and thinking: read out of the text of an answer, and forced by a grammar."""
