"""Products with constant weights: what torch gives, in any size; a row's result does not depend on the others."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import library
from torch._inductor import config as inductor_config

from verifier.cpu.build import NoLibrary, load_library
from verifier.cpu.compiled import CompiledForward, free_name
from verifier.cpu.products import DTYPES, JoinProducts, Products, are_products_ours, define, multiply_by_torch, quicken
from verifier.model import Target


@pytest.fixture(scope="module")
def products() -> Products:
    try:
        return Products()
    except NoLibrary as error:
        pytest.skip(str(error))


def random_weights(rng: np.random.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    """[K, N_i] as they lie in models: transposed or not, some a part of something larger."""
    width = int(rng.choice([1, 2, 7, 32, 63, 128, 300]))
    weights = []
    for _ in range(int(rng.integers(1, 4))):
        outputs = int(rng.choice([1, 3, 16, 64, 65, 200]))
        whole = torch.from_numpy(rng.standard_normal((outputs + 2, width + 1), np.float32)).to(dtype)
        weights.append(whole[1:-1, :-1].t() if rng.random() < 0.7 else whole[1:-1, :-1].t().contiguous())
    return weights


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("seed", range(30))
def test_any_size_is_the_product(products: Products, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        weights = random_weights(rng, dtype)
        rows, width = int(rng.choice([1, 2, 3, 5, 6, 7, 13, 96, 100, 200])), weights[0].shape[0]
        whole = torch.from_numpy(rng.standard_normal((rows, width + 3), np.float32)).to(dtype)
        x = whole[:, 1:-2] if rng.random() < 0.5 else whole[:, 1:-2].t().contiguous().t()
        found = products.multiply(x, weights)
        expected = x.double() @ torch.cat(weights, dim=1).double()
        exact = (x.double().abs() @ torch.cat(weights, dim=1).double().abs()) * 2.0**-20
        rounding = expected.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0.0
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert ((found.double() - expected).abs() <= exact + rounding + 1e-30).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_is_the_same_whatever_the_others_are(products: Products, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(130, 301, generator=generator).to(dtype).t()
    x = torch.randn(200, 301, generator=generator).to(dtype)
    whole = products.multiply(x, [weight])
    for first, count in ((0, 1), (3, 2), (17, 5), (40, 6), (90, 7), (101, 99)):
        assert torch.equal(products.multiply(x[first : first + count], [weight]), whole[first : first + count])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_no_number_stays_none(products: Products, dtype: torch.dtype) -> None:
    weight = torch.ones(70, 3, dtype=dtype).t()
    x = torch.tensor([[1.0, float("nan"), 0.0], [float("inf"), 1.0, 1.0], [3e38, 3e38, 3e38]], dtype=dtype)
    found = products.multiply(x, [weight])
    assert found[0].isnan().all()
    assert (found[1] == float("inf")).all()
    assert (found[2] == float("inf")).all()


def test_every_bfloat16_that_is_no_number_stays_none(products: Products) -> None:
    bits = torch.cat([torch.arange(0x7F81, 0x8000), torch.arange(0xFF81, 0x10000)])
    x = bits.to(torch.uint16).view(torch.bfloat16)[:, None]
    for factor in (1.0, -3.0):
        assert products.multiply(x, [torch.full((1, 65), factor, dtype=torch.bfloat16)]).isnan().all()


def test_other_weights_in_the_same_place_are_other_weights(products: Products) -> None:
    """What was packed is kept, so that its memory cannot be given to another weight."""
    for value in range(1, 30):
        weight = torch.full((8, 64), float(value)).t()
        assert products.multiply(torch.ones(1, 64), [weight])[0, 0] == 64.0 * value
        del weight


def test_views_of_one_weight_are_different_weights(products: Products) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    for view in (weight, weight.t(), weight[:, :40]):
        torch.testing.assert_close(products.multiply(x, [view]), x @ view)


class Block(torch.nn.Module):
    """Three products with one input, one of them with a bias, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(24, 33)
        self.third, self.last = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.last(torch.nn.functional.silu(self.first(x)) * self.third(x)), self.second(x)


@pytest.mark.filterwarnings("ignore")  # the compiler uses what torch itself is about to remove
@pytest.mark.parametrize(("dtype", "is_ours"), [*[(dtype, True) for dtype in DTYPES], (torch.bfloat16, False)])
def test_products_of_a_graph_are_joined_and_stay_the_same(
    dtype: torch.dtype, is_ours: bool, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    block = Block().to(dtype).eval().requires_grad_(False)
    multiply = request.getfixturevalue("products").multiply if is_ours else multiply_by_torch
    calls: list[tuple[int, ...]] = []

    def watched(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        assert all(weight.stride(0) == 1 for weight in weights), "the weights lie as they did"
        calls.append(tuple(weight.shape[1] for weight in weights))
        return multiply(x, weights)

    owner = library.Library("foretoken", "FRAGMENT")  # type: ignore[no-untyped-call]
    join = JoinProducts(define(owner, free_name("multiply"), watched))
    run = torch.compile(lambda x: block(x), backend="inductor", dynamic=True, fullgraph=True)
    options = {"freezing": True, "cpp.weight_prepack": False, "post_grad_custom_pre_pass": join}
    with torch.no_grad(), inductor_config.patch(options):
        for rows in (3, 1, 50):
            x = torch.randn(rows, 24).to(dtype)
            calls.clear()
            for found, expected in zip(run(x), block(x), strict=True):
                torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
            assert calls == [(40, 40, 33), (5,)] or calls == [(40, 33, 40), (5,)], calls


def test_a_processor_without_wide_vectors_leaves_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        real = load_library()
    except NoLibrary as error:
        pytest.skip(str(error))
    monkeypatch.setattr(real, "product_is_fast", lambda: 0)
    with pytest.raises(NoLibrary, match="256 bits"):
        Products()
    assert isinstance(real, ctypes.CDLL)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_our_code_weights_lie_as_they_are_where_torch_packs_none(
    dtype: torch.dtype, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's compiler would lay them out for itself, which makes products in bfloat16 8 times slower."""

    def refuse() -> None:
        raise NoLibrary("none here")

    monkeypatch.setattr("verifier.cpu.compiled.Products", refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_packed)
    network = torch.nn.Linear(2, 2, dtype=dtype)
    network.get_output_embeddings = lambda: None  # type: ignore[operator]
    forward = CompiledForward.__new__(CompiledForward)
    forward._target = Target(network)
    expected = None if dtype == torch.float32 or is_packed else multiply_by_torch
    assert forward._multiply() is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quickened_network_gives_what_it_gave(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False), torch.nn.SiLU(), torch.nn.Linear(40, 7)).to(
        dtype
    )
    weight = torch.randn(33, 24, dtype=dtype)
    x = torch.randn(2, 3, 24, dtype=dtype)
    with torch.inference_mode():
        expected, apart = network(x), torch.nn.functional.linear(x, weight)
        linear = quicken(network, dtype)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(network(x), expected, **tolerance)
        torch.testing.assert_close(linear(x, weight), apart, **tolerance)
    is_ours = are_products_ours() and dtype != torch.float16
    assert (linear is not torch.nn.functional.linear) == is_ours
