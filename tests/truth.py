"""What transformers itself answers: the truth that answers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.inference_mode()
def greedy_answer(model: Any, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The tokens of `model.generate`, whatever ends a text, and the logits [tokens, V] that they were chosen from."""
    out = model.generate(
        torch.tensor([list(prompt)], device=model.device),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64, device=model.device),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0]
