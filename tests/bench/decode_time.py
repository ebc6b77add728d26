"""How long reading an answer takes, token by token, for each kind of decoder: it must grow as the answer does.

    python -m tests.bench.decode_time [--rounds 5]

Prints microseconds per token for answers of 2,000 to 16,000 tokens: words and bytes mixed, and one long run of bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from random import Random

from server.detokenize import Detokenizer
from tests.unit.test_detokenize import FIRST_BYTE, TEXTS, TOKENIZERS

SIZES = (2_000, 4_000, 8_000, 16_000)
NAMES = ("byte-level", "byte fallback, strip", "byte fallback, not fused", "metaspace", "replace in all", "word pieces")


def measure(name: str, ids: list[int], num_rounds: int) -> float:
    """Microseconds per token, the fastest of some rounds; a stop string makes every token be looked at."""
    times = []
    for _ in range(num_rounds):
        detokenizer = Detokenizer(TEXTS[name].reader(), ("never said",))
        start_s = time.perf_counter()
        for token in ids:
            detokenizer.feed((token,))
        detokenizer.finish()
        times.append(time.perf_counter() - start_s)
    return 1e6 * min(times) / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    num_rounds = parser.parse_args().rounds
    rows: dict[str, list[float]] = {}
    for name in NAMES:
        first = 0 if name == "byte-level" else FIRST_BYTE
        pools = {
            "mixed": range(TOKENIZERS[name].get_vocab_size()),
            "one run of bytes": [first + b for b in "🙂".encode()],
        }
        for kind, pool in pools.items():
            ids = Random(0).choices(pool, k=max(SIZES))
            rows[f"{name}, {kind}"] = [round(measure(name, ids[:length], num_rounds), 2) for length in SIZES]
            print(f"{name + ', ' + kind:44}", *(f"{value:7.2f}" for value in rows[f"{name}, {kind}"]))
    print(json.dumps({"sizes": SIZES, "us_per_token": rows}))


if __name__ == "__main__":
    main()
