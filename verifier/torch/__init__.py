"""The portable back end: torch alone, on any device."""
