"""The CTC head: the target's hidden states of accepted tokens in, T frames of next-token guesses out, in one pass.

After CTC-drafter (NeurIPS 2024, arXiv 2412.00061), made parallel: learned slots in place of a draft model that runs
token by token, keys and values injected from the target's states, and a blank of its own in place of a real token.
What the frames mean is in tests.collapse; training is in training.train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_NORM_EPS = 1e-6

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which positions turn keys and queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What a head is built from; stored beside its weights."""

    vocab_size: int
    """V: tokens the target can emit."""
    embed_size: int
    """E: width of the target's input embedding."""
    hidden_size: int
    """H: width of the target's final hidden states."""
    width: int
    """d: width of the head's own states."""
    num_layers: int = 2
    num_heads: int = 4
    ffn_size: int = 512
    num_slots: int = 8
    """T: frames of one pass, hence most tokens it can guess."""
    window: int = 64
    """W: accepted tokens whose states it looks back at."""
    residual_rank: int = 32
    """Rank of the head's own addition to the target's output embedding; 0 for none."""
    bias_rank: int = 32
    """Rank of the previous-token bias; 0 for none."""
    rope_theta: float = 10_000.0
    draft_vocab_size: int = 0
    """Tokens the head can guess, listed in `Head.draft_tokens`; 0 for all V. Scoring V tokens in every frame would cost
    more than the rest of the head; a sixth of a vocabulary makes 98 of 100 tokens of an answer."""

    @property
    def num_drafted(self) -> int:
        """N: tokens of a frame. The blank is one more, with index N."""
        return self.draft_vocab_size or self.vocab_size


@dataclass(frozen=True, slots=True)
class Context:
    """Keys and values of accepted tokens, one pair per layer. S positions per row."""

    keys: Tensor  # [R, L, heads, S, d / heads], rotated
    values: Tensor  # [R, L, heads, S, d / heads]


class Head(nn.Module):
    """The network. The target's two embeddings are given to the calls that need them and are never trained here.

    Frames speak of N tokens by their place in the draft vocabulary.
    """

    draft_tokens: Tensor  # [N] int64, ids that rise; all of the target's vocabulary where the shape lists none

    def __init__(self, shape: HeadShape, draft_tokens: Tensor | None = None) -> None:
        """`draft_tokens` [N] int64: the draft vocabulary, where `shape` says there is one. Weights may bring it too."""
        super().__init__()
        self.shape = shape
        listed = torch.arange(shape.num_drafted) if draft_tokens is None else draft_tokens
        self.register_buffer("draft_tokens", listed, persistent=shape.draft_vocab_size > 0)
        width = shape.width
        self.state_norm = nn.RMSNorm(shape.hidden_size, eps=_NORM_EPS)
        self.token_norm = nn.RMSNorm(shape.embed_size, eps=_NORM_EPS)
        self.from_state = nn.Linear(shape.hidden_size, width, bias=False)
        self.from_token = nn.Linear(shape.embed_size, width, bias=False)
        self.context_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.context_kv = nn.Linear(width, 2 * shape.num_layers * width, bias=False)
        self.slots = nn.Parameter(torch.randn(shape.num_slots, width) * 0.5)
        self.heat = nn.Parameter(torch.zeros(shape.num_slots, width))
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.out_norm = nn.RMSNorm(width, eps=_NORM_EPS)
        self.to_state = nn.Linear(width, shape.hidden_size, bias=False)
        self.to_blank = nn.Linear(width, 1)
        if shape.residual_rank:
            self.residual_in = nn.Linear(width, shape.residual_rank, bias=False)
            self.residual_out = nn.Parameter(torch.zeros(shape.num_drafted, shape.residual_rank))
        if shape.bias_rank:
            # With a list, one row more stands for every token that is not on it: an answer may go on from any.
            num_before = shape.draft_vocab_size + 1 if shape.draft_vocab_size else shape.vocab_size
            self.bias_from = nn.Parameter(torch.randn(num_before, shape.bias_rank) * 0.1)
            self.bias_to = nn.Parameter(torch.zeros(shape.num_drafted, shape.bias_rank))

    def places(self, tokens: Tensor) -> Tensor:
        """Places of `tokens` int64 in the draft vocabulary, N for one that is not in it."""
        if not self.shape.draft_vocab_size:
            return tokens
        found = torch.searchsorted(self.draft_tokens, tokens).clamp_max(self.shape.num_drafted - 1)
        return torch.where(self.draft_tokens[found] == tokens, found, self.shape.num_drafted)

    def rows(self, output_embedding: Tensor) -> Tensor:
        """The rows [N, H] of the target's output embedding [V, H] that `logits` needs: a copy where there is a list."""
        return output_embedding[self.draft_tokens] if self.shape.draft_vocab_size else output_embedding

    def read(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Features [..., d] of accepted tokens.

        Args: `states` [..., H], the target's final state that predicted each token; `embedded` [..., E], the token in
        the target's input embedding.
        """
        mixed = self.from_state(self.state_norm(states)) + self.from_token(self.token_norm(embedded))
        normed: Tensor = self.context_norm(mixed)
        return normed

    def context(self, features: Tensor, positions: Tensor) -> Context:
        """Keys and values of the tokens with `features` [R, S, d] at `positions` [R, S] int64."""
        shape = self.shape
        num_rows, num_places, _ = features.shape
        split = self.context_kv(features).view(num_rows, num_places, 2, shape.num_layers, shape.num_heads, -1)
        keys, values = split.permute(2, 0, 3, 4, 1, 5)
        cos, sin = self.rotation(positions, keys.dtype)
        return Context(rotate(keys, (cos[:, None, None], sin[:, None, None])), values)

    def slot_states(
        self, anchors: Tensor, positions: Tensor, temperatures: Tensor, context: Context, is_visible: Tensor
    ) -> Tensor:
        """States [R, A, T, d] of the slots behind A anchors of each row.

        Args: `anchors` [R, A, d], features of the tokens to go on from; `positions` [R, A] int64, where these stand;
        `temperatures` [R], at which the target samples; `is_visible` [R, A, S], what an anchor may see of the context.
        """
        shape = self.shape
        heat = temperatures[:, None, None, None] * self.heat
        slots = anchors[:, :, None] + self.slots + heat
        ahead = torch.arange(1, shape.num_slots + 1, device=positions.device)
        cos, sin = self.rotation(positions[..., None] + ahead, slots.dtype)  # [R, A, T, d / heads / 2]
        rotation = cos[:, :, :, None, None], sin[:, :, :, None, None]
        own = is_visible.new_ones(*is_visible.shape[:2], shape.num_slots)
        mask = torch.cat([is_visible, own], dim=-1)
        for index, layer in enumerate(self.layers):
            slots = layer(slots, rotation, Context(context.keys[:, index], context.values[:, index]), mask)
        normed: Tensor = self.out_norm(slots)
        return normed

    def logits(self, frames: Tensor, rows: Tensor) -> Tensor:
        """Scores [..., N + 1] of frames [..., d], the blank last; `rows` [N, H] are what `rows` gives."""
        tokens = functional.linear(self.to_state(frames), rows)
        if self.shape.residual_rank:
            tokens = tokens + functional.linear(self.residual_in(frames), self.residual_out)
        return torch.cat([tokens, self.to_blank(frames)], dim=-1)

    def folded(self, rows: Tensor) -> Tensor:
        """One matrix [N + 1, d] in place of all of `logits` but the bias of the blank: less to read at run time."""
        # In float32: a product of large matrices in 16 bits takes seconds on a processor that cannot multiply them.
        tokens = rows.float() @ self.to_state.weight.float()
        if self.shape.residual_rank:
            tokens = tokens + self.residual_out.float() @ self.residual_in.weight.float()
        return torch.cat([tokens.to(rows.dtype), self.to_blank.weight])

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines [..., d / heads / 2] of rotary position embedding (arXiv 2104.09864)."""
        size = self.shape.width // self.shape.num_heads
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions[..., None].float() * self.shape.rope_theta**-exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _Layer(nn.Module):
    """Pre-norm attention of slots over context and each other, then a gated feed-forward."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.attention_norm = nn.RMSNorm(shape.width, eps=_NORM_EPS)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.merge = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=_NORM_EPS)
        self.gate_up = nn.Linear(shape.width, 2 * shape.ffn_size, bias=False)
        self.down = nn.Linear(shape.ffn_size, shape.width, bias=False)

    def forward(self, slots: Tensor, rotation: Rotation, context: Context, mask: Tensor) -> Tensor:
        """Slots [R, A, T, d]; `context` of this layer [R, heads, S, d / heads]; `mask` [R, A, S + T]: what to see."""
        slots = slots + self.merge(self._attend(self.attention_norm(slots), rotation, context, mask))
        gate, up = self.gate_up(self.ffn_norm(slots)).chunk(2, dim=-1)
        out: Tensor = slots + self.down(functional.silu(gate) * up)
        return out

    def _attend(self, slots: Tensor, rotation: Rotation, context: Context, mask: Tensor) -> Tensor:
        num_rows, num_anchors, num_slots, width = slots.shape
        split = self.qkv(slots).view(num_rows, num_anchors, num_slots, 3, self.num_heads, -1)
        query, key = rotate(split[:, :, :, :2], rotation).permute(3, 0, 4, 1, 2, 5)  # [R, heads, A, T, d / heads]
        value = split[:, :, :, 2].permute(0, 3, 1, 2, 4)
        if num_anchors == 1:
            mixed = _attend_one(query, key, value, context, mask)
        else:
            mixed = _attend_many(query, key, value, context, mask)
        return mixed.permute(0, 2, 3, 1, 4).reshape(num_rows, num_anchors, num_slots, width)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, context: Context, mask: Tensor) -> Tensor:
    """Attention of the slots of one anchor [R, heads, 1, T, d / heads] over context and each other."""
    keys = torch.cat([context.keys, key[:, :, 0]], dim=2)
    values = torch.cat([context.values, value[:, :, 0]], dim=2)
    mixed = functional.scaled_dot_product_attention(query[:, :, 0], keys, values, attn_mask=mask[:, None])
    return mixed[:, :, None]


def _attend_many(query: Tensor, key: Tensor, value: Tensor, context: Context, mask: Tensor) -> Tensor:
    """The same for A anchors [R, heads, A, T, d / heads] that share a context, each with its own view of it."""
    num_places = context.keys.shape[2]
    back = query.flatten(2, 3) @ context.keys.transpose(-1, -2)  # [R, heads, A * T, S]
    own = query @ key.transpose(-1, -2)  # [R, heads, A, T, T]
    scores = torch.cat([back.view(*own.shape[:4], num_places), own], dim=-1) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, None, :, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    mixed: Tensor = (weights[..., :num_places].flatten(2, 3) @ context.values).view_as(value)
    return mixed + weights[..., num_places:] @ value


def rotate(vectors: Tensor, rotation: Rotation) -> Tensor:
    """Rotate halves of `vectors` [..., size] by angles whose cosines and sines [..., size / 2] broadcast."""
    cos, sin = rotation
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
