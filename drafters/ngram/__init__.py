"""The adaptive tri-gram drafter, after ADED (AAAI 2025)."""
