"""The K/V pool: layers of equal geometry share memory, moves reach every layer and survive overlaps."""

from __future__ import annotations

import torch

from verifier.kv import KVPool
from verifier.probe import LayerGeometry


def geometry(kv_heads: int, k_dim: int, v_dim: int) -> LayerGeometry:
    return LayerGeometry("layer", kv_heads, kv_heads, k_dim, v_dim, 1.0, None, None, False)


def test_moves_reach_every_layer() -> None:
    layers = [geometry(2, 4, 4), geometry(1, 4, 6), geometry(2, 4, 4)]
    pool = KVPool(layers, num_pages=3, page_size=4, dtype=torch.float32, device="cpu")
    for index in range(3):
        for tensor in pool.layer(index):
            tensor.copy_(torch.arange(12, dtype=torch.float32)[:, None, None].expand_as(tensor))
    pool.move(torch.tensor([5, 6, 9]), torch.tensor([4, 5, 6]))
    for index in range(3):
        k, v = pool.layer(index)
        assert k.shape == (12, layers[index].num_kv_heads, layers[index].k_dim)
        assert v.shape[2] == layers[index].v_dim
        for tensor in (k, v):
            assert tensor[4:7, 0, 0].tolist() == [5, 6, 9]
            assert tensor[:4, 0, 0].tolist() == [0, 1, 2, 3]
