"""Drafters by name. A name resolves to "module:Class" only when it is chosen."""

REGISTRY: dict[str, str] = {
    "none": "drafters.none:NoneDrafter",
    "trigram": "drafters.trigram.drafter:TrigramDrafter",
    "suffix": "drafters.predicted:SuffixDrafter",
    "ctc": "drafters.ctc.drafter:CtcDrafter",
    "hybrid": "drafters.hybrid:HybridDrafter",
}
