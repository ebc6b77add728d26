"""The target's weights as a drafter may share them: cut to the vocabulary, or refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.config import Settings
from server.errors import StartupError
from server.worker.loading import DrafterNeeds, share_weights
from verifier.model import ModelError
from verifier.weights import shared_weights

VOCAB = 10


class Network(torch.nn.Module):
    def __init__(self, read: torch.nn.Module | None, said: torch.nn.Module | None) -> None:
        super().__init__()
        self.read, self.said = read, said

    def get_input_embeddings(self) -> torch.nn.Module | None:
        return self.read

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.said


def test_rows_that_pad_the_vocabulary_are_cut() -> None:
    read, said = torch.nn.Embedding(16, 4), torch.nn.Linear(6, 16, bias=False)
    weights = shared_weights(Network(read, said), VOCAB)
    assert weights.input_embedding.shape == (VOCAB, 4)
    assert weights.output_embedding.shape == (VOCAB, 6)
    assert weights.hidden_size == 6
    assert weights.input_embedding.data_ptr() == read.weight.data_ptr()
    assert weights.output_embedding.data_ptr() == said.weight.data_ptr()


@pytest.mark.parametrize("said", [None, torch.nn.Identity(), torch.nn.Linear(6, 9)])
def test_a_target_without_them_is_refused_at_the_start(said: Any) -> None:
    network = Network(torch.nn.Embedding(VOCAB, 4), said)
    with pytest.raises(ModelError, match="Network has no output embedding"):
        shared_weights(network, VOCAB)

    class Verifier(SimpleNamespace):
        @property
        def shared_weights(self) -> object:
            return shared_weights(network, VOCAB)

    with pytest.raises(StartupError, match="Network has no output embedding"):
        share_weights(Verifier())  # type: ignore[arg-type]


def test_without_a_target_there_is_nothing_to_share() -> None:
    with pytest.raises(StartupError, match="loaded target"):
        DrafterNeeds(Settings(model="unread"), VOCAB).shared_weights()
