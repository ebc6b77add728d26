"""The shared noise: the published generator, the same bits in every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verifier import noise
from verifier.cpu import noise as host_noise

SEEDS = [0, 1, 123_456_789_012_345, 2**63 - 5, -3]
POSITIONS = [0, 77, 2**31, 2**33 + 1]


def test_known_answer() -> None:
    """Philox 4x32-10 of key 0 and counter 0, from the authors' known-answer file."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert host_noise.words_host(np.uint64(0), 0, 4).tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("position", POSITIONS)
def test_same_bits_on_host_and_device(seed: int, position: int) -> None:
    host = host_noise.words_host(np.uint64(seed & (2**64 - 1)), position, 1003)
    device = noise.words(torch.tensor([seed]), torch.tensor([position]), torch.arange(1003))
    assert device[0].tolist() == host.tolist()


def test_gumbel_agrees_and_looks_gumbel() -> None:
    tokens = torch.arange(20_000)
    device = noise.gumbel_device(torch.tensor([9]), torch.tensor([4]), tokens)[0]
    host = torch.tensor([host_noise.gumbel(np.uint64(9), 4, token) for token in range(500)], dtype=torch.float64)
    torch.testing.assert_close(host, device[:500], rtol=1e-12, atol=1e-12)
    assert abs(device.mean().item() - 0.5772) < 0.03
    assert abs(device.var().item() - np.pi**2 / 6) < 0.06
    assert device.max().item() < host_noise.MAX_GUMBEL


def test_rows_are_independent_of_their_batch() -> None:
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    together = noise.words(seeds, positions, torch.arange(64))
    for place in range(3):
        alone = noise.words(seeds[place : place + 1], positions[place : place + 1], torch.arange(64))
        assert torch.equal(together[place], alone[0])
