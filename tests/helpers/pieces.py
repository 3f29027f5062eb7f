"""Whole tensors out of what each rank holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor."""

    value: Tensor
    dimension: int | None
    tp_rank: int


def take_pieces(
    chunks: Iterable[nn.Module], tp_rank: int, value_of: Callable[[nn.Parameter], Tensor | None]
) -> dict[str, Piece]:
    """This rank's part of a value of each parameter, by the parameter's name; None is left out."""
    return {
        name: Piece(value.detach().float().clone(), _dimension(parameter), tp_rank)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if (value := value_of(parameter)) is not None
    }


def _dimension(parameter: Tensor) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def whole_tensors(ranks: Sequence[dict[str, Piece]], *, vocab_size: int) -> dict[str, Tensor]:
    """Put the ranks' parts together; rows that pad the vocabulary are left out."""
    parts: dict[str, dict[int, Piece]] = {}
    for rank in ranks:
        for name, piece in rank.items():
            parts.setdefault(name, {})[piece.tp_rank] = piece
    whole = {name: _join(name, [pieces[rank] for rank in sorted(pieces)]) for name, pieces in parts.items()}
    return whole | {name: whole[name][:vocab_size] for name in VOCABULARY if name in whole}


def _join(name: str, pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    if first.dimension is None:
        for piece in pieces[1:]:
            assert torch.equal(piece.value, first.value), f"{name} differs between tensor-parallel ranks"
        return first.value
    if name.startswith("language_model.") and ".linear_fc1." in name:
        halves = [piece.value.chunk(2) for piece in pieces]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat([piece.value for piece in pieces], first.dimension)
