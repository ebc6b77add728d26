"""From logits to a token, in torch, float64: the oracle of the host sampler, and what a device runs.

Order: penalties, bias, minimum length, temperature, top-k, top-p, min-p, then argmax of what is left plus the shared
noise. Temperature 0 takes the argmax before the truncations, which cannot remove it. Ties go to the lowest token.
"""

from __future__ import annotations

import torch

from verifier.accept import Choice
from verifier.noise import gumbel_device
from verifier.rows import SamplingRows


def choose(logits: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """The target's token at each place.

    Args: logits [S, V], any float type.
    Returns: [S] int64; -1 where the logits are not finite.
    """
    records = state.records[choice.rows]
    z = process(logits.double(), state, choice)
    tokens = z.argmax(dim=-1)
    sampled = [place for place, record in enumerate(records) if record["temperature"] > 0]
    if sampled:
        device = logits.device
        seeds = torch.tensor(records["seed"][sampled].astype("int64"), device=device)
        positions = torch.tensor([choice.positions[place] for place in sampled], device=device)
        noise = gumbel_device(seeds, positions, torch.arange(z.shape[1], device=device))
        tokens[sampled] = (truncate(z[sampled], state, [choice.rows[p] for p in sampled]) + noise).argmax(dim=-1)
    broken = torch.isnan(logits).any(dim=-1) | torch.isposinf(logits).any(dim=-1)
    broken |= ~torch.isfinite(z.amax(dim=-1))
    return torch.where(broken, -1, tokens)


def process(z: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """Penalties, bias and minimum length on logits z [S, V] float64. Returns a new tensor."""
    z = z.clone()
    for place, (row, position) in enumerate(zip(choice.rows, choice.positions, strict=True)):
        record = state.records[row]
        if record["has_penalties"]:
            counts = torch.from_numpy(state.counts[row]).to(z.device)
            seen = torch.from_numpy(state.in_prompt[row]).to(z.device) | (counts > 0)
            penalised = torch.where(z[place] > 0, z[place] / record["repetition"], z[place] * record["repetition"])
            z[place] = torch.where(seen, penalised, z[place])
            z[place] -= counts * float(record["frequency"]) + (counts > 0) * float(record["presence"])
        for index in range(int(record["num_biases"])):
            z[place, int(state.bias_tokens[row, index])] += float(state.bias_values[row, index])
        if position < record["first_free"]:
            z[place, state.stop_ids[row, : int(record["num_stops"])].tolist()] = float("-inf")
    return z


def truncate(z: torch.Tensor, state: SamplingRows, rows: list[int]) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p as minus infinity, on z [S, V] float64 of rows with temperature > 0."""
    z = z.clone()
    infinity = float("-inf")
    for place, row in enumerate(rows):
        record = state.records[row]
        z[place] = (z[place] - z[place].max()) / float(record["temperature"])
        top_k = int(record["top_k"])
        if 0 < top_k < z.shape[1]:
            threshold = z[place].topk(top_k).values[-1]
            z[place] = torch.where(z[place] < threshold, infinity, z[place])
        if record["top_p"] < 1:
            ordered, order = z[place].sort(descending=True, stable=True)
            weights = torch.exp(ordered - ordered[0])
            before = weights.cumsum(0) - weights
            dropped = before >= float(record["top_p"]) * weights.sum()
            dropped[0] = False
            z[place, order[dropped]] = infinity
        if record["min_p"] > 0:
            best = z[place].max()
            z[place] = torch.where(torch.exp(z[place] - best) < float(record["min_p"]), infinity, z[place])
    return z
