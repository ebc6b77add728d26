"""Products with constant weights: what torch gives, in any size; a row's result does not depend on the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verifier.cpu.build import NoLibrary, load_library
from verifier.cpu.products import DTYPES, Product, has_products

pytestmark = pytest.mark.skipif(not has_products(), reason="no compiled products on this machine")


def random_weights(rng: np.random.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    """[N_i, K] as they lie in models: transposed or not, some a part of something larger."""
    width = int(rng.choice([1, 2, 7, 32, 63, 128, 300]))
    weights = []
    for _ in range(int(rng.integers(1, 4))):
        outputs = int(rng.choice([1, 3, 16, 64, 65, 200]))
        whole = torch.from_numpy(rng.standard_normal((outputs + 2, width + 1), np.float32)).to(dtype)
        weights.append(whole[1:-1, :-1] if rng.random() < 0.7 else whole[1:-1, :-1].t().contiguous().t())
    return weights


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("seed", range(30))
def test_any_size_is_the_product(dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        weights = random_weights(rng, dtype)
        rows, width = int(rng.choice([1, 2, 3, 5, 6, 7, 13, 96, 100, 200])), weights[0].shape[1]
        whole = torch.from_numpy(rng.standard_normal((rows, width + 3), np.float32)).to(dtype)
        x = whole[:, 1:-2] if rng.random() < 0.5 else whole[:, 1:-2].t().contiguous().t()
        product = Product(weights)
        found, matrix = product(x), torch.cat(weights).double().t()
        expected = x.double() @ matrix
        exact = (x.double().abs() @ matrix.abs()) * 2.0**-20
        rounding = expected.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert ((found.double() - expected).abs() <= exact + rounding + 1e-30).all()
        assert torch.equal(product(x[None, None]), found[None, None])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_is_the_same_whatever_the_others_are(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    product = Product([torch.randn(130, 301, generator=generator).to(dtype)])
    x = torch.randn(200, 301, generator=generator).to(dtype)
    whole = product(x)
    for first, count in ((0, 1), (3, 2), (17, 5), (40, 6), (90, 7), (101, 99)):
        assert torch.equal(product(x[first : first + count]), whole[first : first + count])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, float("nan"), 0.0], [float("inf"), 1.0, 1.0], [3e38, 3e38, 3e38]], dtype=dtype)
    found = Product([torch.ones(70, 3, dtype=dtype)])(x)
    assert found[0].isnan().all()
    assert (found[1] == float("inf")).all()
    assert (found[2] == float("inf")).all()


def test_every_bfloat16_that_is_no_number_stays_none() -> None:
    bits = torch.cat([torch.arange(0x7F81, 0x8000), torch.arange(0xFF81, 0x10000)])
    x = bits.to(torch.uint16).view(torch.bfloat16)[:, None]
    for factor in (1.0, -3.0):
        assert Product([torch.full((65, 1), factor, dtype=torch.bfloat16)])(x).isnan().all()


@pytest.mark.parametrize("x", [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 4)])
def test_rows_that_the_weights_do_not_fit_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="for 3"):
        Product([torch.ones(5, 3)])(x)


def test_a_processor_without_wide_vectors_leaves_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_library(), "product_is_fast", lambda: 0)
    assert not has_products()


def test_without_a_compiler_there_are_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NoLibrary("none here")

    monkeypatch.setattr("verifier.cpu.products.load_library", refuse)
    assert not has_products()
