"""A few trial requests before the worker calls itself ready: what is compiled on first use is compiled then."""

from __future__ import annotations

from drafters.base import NOBODY
from server.errors import StartupError
from server.messages import Speculation, Submit
from server.worker.loop import Loop
from verifier.plan import MAX_TREE_NODES, SamplingParams

_PROMPT_LEN = 8
_MAX_TOKENS = 8

_TRIALS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "stop_ids": (0,),
        "num_logprobs": 1,
    },
)


def warm_up(loop: Loop, vocab_size: int) -> None:
    """Run every loaded drafter with every kind of sampling. Raises: StartupError if the model fails on it."""
    context_len = loop.scheduler.limits.context_len
    prompt = tuple(index % vocab_size for index in range(1, min(_PROMPT_LEN, context_len - 1) + 1))
    for trial in _TRIALS:
        for name in loop.drafting.names:
            sampling = SamplingParams(max_tokens=_MAX_TOKENS, seed=1, **trial)
            loop.handle(Submit(f"warm-up {name}", prompt, sampling, Speculation(name, MAX_TREE_NODES), NOBODY))
        while loop.has_work:
            for error in loop.step().errors:
                raise StartupError(f"the model failed on a trial request: {error.message}", is_final=False)
