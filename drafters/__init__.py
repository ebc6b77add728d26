"""Drafters by name. A request names one; the engine asks it for trees."""

NGRAM, COPY, HEAD = 1, 2, 4
"""The sources of guesses, as bits of a mask."""

MASKS: dict[str, int] = {"trigram": NGRAM, "suffix": COPY, "ctc": HEAD, "hybrid": NGRAM | COPY | HEAD}
"""The sources behind each name of the tree drafter (drafters.drafter)."""

PLAIN = "none"
"""The name of plain decoding: no drafter."""

REGISTRY: dict[str, str] = {PLAIN: "", **dict.fromkeys(MASKS, "drafters.drafter:TreeDrafter")}
"""All names that a request may use. Another drafter is entered as "module:Class"; it is imported when it is made."""
