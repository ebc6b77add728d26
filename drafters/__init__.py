"""Drafters by name. A name resolves to "module:Class" only when it is chosen."""

REGISTRY: dict[str, str] = {
    "none": "drafters.none:NoneDrafter",
    "trigram": "drafters.ngram.drafter:TrigramDrafter",
    "suffix": "drafters.predicted:SuffixDrafter",
    "ctc": "drafters.head.drafter:CtcDrafter",
    "hybrid": "drafters.drafter:HybridDrafter",
}
