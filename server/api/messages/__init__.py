"""Anthropic's Messages API, said as chat."""
