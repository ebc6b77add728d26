"""How far a compiled pass may be off: in 16 bits about as far as the plain pass, both measured against float32.

What rounding costs depends on the network: on its depth, and on how much of what it adds up cancels. So it is measured
and not assumed. The plain pass alone is no measure: a fused pass rounds less often, so the two may differ by more than
either differs from the truth.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import torch

from verifier.model import KV_ATTRIBUTE, AttentionInputs, Pass, Target
from verifier.probe import LayerGeometry

_FACTORS = (2.0, 3.0)
"""How much further off than the plain pass is still chance: median and maximum, which is of one position.

Compiled passes in bfloat16 come to 0.9 and 1.5; sums that are kept in bfloat16 to 2 to 4 in the median, weights of 8
bits to 5 to 13.
"""
_APART = {torch.float32: 3e-4, torch.bfloat16: 24 * 2.0**-7, torch.float16: 24 * 2.0**-10}
"""How far two passes may be apart where there is no wider one.

In float32 sums of another order come to 2e-5 in SmolLM2-135M, and to 1e-6 in most models; a product of fewer digits
comes to 1e-3. In 16 bits it is for quantised weights alone, of which little is known.
"""

logger = logging.getLogger(__name__)


class CausalAttention:
    """Attention of the positions of one pass to each other, without K/V memory.

    It must be what the network was trained with. With another function in its place a deep network may be chaotic, so
    that rounding alone moves its logits by more than their size.
    """

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        geometry, query = getattr(inputs.module, KV_ATTRIBUTE).geometry, inputs.query
        places = torch.arange(query.shape[2], device=query.device)
        back = places[:, None] - places[None]
        visible = (back >= 0) & (back < (geometry.window or query.shape[2]))
        key, value = (tensor[0].transpose(0, 1).float() for tensor in (inputs.key, inputs.value))
        return softmax_attention(query[0].float(), key, value, visible, geometry, inputs.sinks)[None].to(query.dtype)


def softmax_attention(
    query: torch.Tensor,  # [heads, n, k_dim] float32 or float64, as key and value
    key: torch.Tensor,  # [L, kv_heads, k_dim]
    value: torch.Tensor,  # [L, kv_heads, v_dim]
    visible: torch.Tensor,  # [n, L] bool
    geometry: LayerGeometry,
    sinks: torch.Tensor | None,  # [heads]
) -> torch.Tensor:
    """Returns: [n, heads, v_dim], in the type of the query."""
    group = geometry.num_heads // geometry.num_kv_heads
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scores = torch.einsum("hnd,lhd->hnl", query, key) * geometry.scaling
    if geometry.softcap is not None:
        scores = torch.tanh(scores / geometry.softcap) * geometry.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hnl,lhd->nhd", weights, value)


class Yardstick:
    """Owns the true logits and states of an example, of which shorter examples are beginnings, and what is allowed."""

    def __init__(self, target: Target, vocab_size: int, num_positions: int) -> None:
        """Runs the plain pass over `num_positions` positions, and in 16 bits the wide one. Raises: what they raise."""
        device = next(target.network.parameters()).device
        places = torch.arange(num_positions, device=device)[None]
        self._inputs = (places * 7 + 3) % vocab_size, places % 16
        plain = target(*self._inputs, CausalAttention())
        wide = None if plain[0].dtype == torch.float32 else self._wide_pass(target)
        self._truth = _parts(plain if wide is None else wide)
        if wide is None:
            self._allowed = [torch.tensor(_APART[plain[0].dtype], device=device)] * len(self._truth)
        else:
            pairs = zip(_parts(plain), self._truth, strict=True)
            unit, factors = torch.finfo(plain[0].dtype).eps, torch.tensor(_FACTORS, device=device)
            self._allowed = [factors * _summary(_distances(*pair)).clamp_min(unit) for pair in pairs]

    def example(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions [1, num_positions]."""
        return self._inputs[0][:, :num_positions], self._inputs[1][:, :num_positions]

    def measure(self, passes: Sequence[tuple[int, Pass]]) -> float:
        """How far passes over examples are off, 1.0 being all that is allowed; infinite where one is not a number.

        Args: `passes`, each with the position of its first row.
        """
        worst = 0.0
        for part, (truth, allowed) in enumerate(zip(self._truth, self._allowed, strict=True)):
            rows = [(first, _parts(one)[part]) for first, one in passes]
            found = torch.cat([_distances(row, truth[first : first + row.shape[0]]) for first, row in rows])
            if not found.isfinite().all() or not allowed.isfinite().all():
                return math.inf
            worst = max(worst, float((_summary(found) / allowed).max()))
        return worst

    def _wide_pass(self, target: Target) -> Pass | None:
        """The pass in float32; None where quantised weights do not compute in it. Raises: what another raises."""
        try:
            with widened(target.network):
                return target(*self._inputs, CausalAttention())
        except (torch.OutOfMemoryError, MemoryError):
            raise  # says nothing of the weights, and what is allowed without a wide pass is only for quantised ones
        except Exception as error:  # whatever the layers of quantised weights raise
            why = str(error).partition("\n")[0]
            if not getattr(target.network, "is_quantized", False):  # transformers says so of what it loads
                raise RuntimeError(f"nothing tells how far off it may be, float32 does not run: {why}") from error
            logger.warning("the forward pass does not run in float32: %s", why)
            return None


@contextlib.contextmanager
def widened(network: torch.nn.Module) -> Iterator[None]:
    """Lets a network compute in float32. Each module has wide weights while it runs and no longer: not all fit."""
    narrow: list[tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]] = []

    def widen(module: torch.nn.Module, _: object) -> None:
        own = dict(module.named_parameters(recurse=False))
        narrow.append((module, own))
        for name, weight in own.items():
            if weight.is_floating_point():
                setattr(module, name, torch.nn.Parameter(weight.float(), requires_grad=False))

    def restore(*_: object) -> None:
        module, own = narrow.pop()
        for name, weight in own.items():
            setattr(module, name, weight)

    hooks = []
    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        while narrow:  # of a pass that failed
            restore()
        for hook in hooks:
            hook.remove()


def _parts(one: Pass) -> list[torch.Tensor]:
    """Logits, and states if there are any."""
    return [part for part in one if part is not None]


def _distances(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far each row of [N, ...] is off, beside its length: [N] float32."""
    truth = truth.float()
    beside: torch.Tensor = (found.float() - truth).norm(dim=-1) / truth.norm(dim=-1)
    return beside


def _summary(distances: torch.Tensor) -> torch.Tensor:
    """Median and maximum: the one shows a product that is wrong, the other a row that is."""
    return torch.stack((distances.median(), distances.max()))
