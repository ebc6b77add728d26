"""What a step made true, told to every source of its rows in one compiled call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from drafters import COPY, NGRAM
from drafters.base import Float32, Int32, Int64
from drafters.calibration import calibrate
from drafters.compiled import Records, compiled
from drafters.copy import Texts, append
from drafters.ngram.backoff import Ngram
from drafters.ngram.update import learn_token, learn_tree
from drafters.rows import RECENT
from drafters.tree_search import Memory


class Told(NamedTuple):
    """Tokens of a step: row rows[r] won tokens[starts[r] : starts[r + 1]]. Their trees, if they were verified."""

    rows: Int32  # [R]
    starts: Int32  # [R + 1]
    tokens: Int64  # [n]
    is_prompt: bool
    """The tokens are a prompt: only the request's own cache may learn them."""
    first: int = -1
    """Index of the first row's tree, -1 if none came along."""
    tree_tokens: Int64 = np.zeros(0, np.int64)  # [N]
    tree_parents: Int32 = np.zeros(0, np.int32)  # [N]
    row_starts: Int32 = np.zeros(0, np.int32)
    candidates: Int32 = np.zeros((0, 1), np.int32)  # [N, K]
    logits: Float32 = np.zeros((0, 1), np.float32)  # [N, K]


@compiled
def learn(held_told: Any, held_memory: Any, held_ngram: Any, held_texts: Any, lessons: Records) -> None:
    """Calibration, n-gram caches, texts and row facts take in what became true.

    Args: the bare tuples of Told, Memory, Ngram and Texts, and one record of drafters.ngram.update.LESSON.
    """
    told, memory = Told(*held_told), Memory(*held_memory)
    ngram, texts, lesson = Ngram(*held_ngram), Texts(*held_texts), lessons[0]
    for index in range(told.rows.size):
        row = np.int64(told.rows[index])
        record, asked = memory.rows[row], memory.asked[row]
        tokens = told.tokens[told.starts[index] : told.starts[index + 1]]
        if not record.is_trial:
            calibrate(tokens, asked, memory.worth, memory.rates[asked.mask])
        if record.mask & NGRAM and told.first >= 0:
            start, stop = told.row_starts[told.first + index], told.row_starts[told.first + index + 1]
            tree = (told.tree_tokens[start:stop], told.tree_parents[start:stop])
            seen = (told.candidates[start:stop], told.logits[start:stop])
            learn_tree(record, (row, record.tenant_cache), tree, seen, ngram, lesson)
        caches = (row, np.int64(-1) if told.is_prompt else record.tenant_cache)
        for place in range(tokens.size):
            if record.mask & NGRAM:
                learn_token(record, caches, tokens[place], ngram, lesson)
            record.recent[record.length % RECENT] = tokens[place]
            record.length += 1
        if record.mask & COPY and not told.is_prompt:
            append(row, tokens, texts)
