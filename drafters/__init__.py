"""Drafters by name. A request names one; the worker asks it for trees."""

NGRAM, COPY, HEAD = 1, 2, 4
"""The sources of guesses, as bits of a mask."""

MASKS: dict[str, int] = {"trigram": NGRAM, "suffix": COPY, "ctc": HEAD, "hybrid": NGRAM | COPY | HEAD}
"""The sources behind each name of the tree drafter (drafters.drafter)."""

PLAIN = "none"
"""The name of plain decoding: no drafter."""

OTHERS: dict[str, str] = {}
"""Further drafters by name, each as "module:Class"; it is imported when it is made."""
