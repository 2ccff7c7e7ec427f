"""Feature descriptions and embedding initializers, with torch-rechub's names, arguments and random numbers.

torch-rechub's own feature objects work wherever these do: a sequence feature is known by its ``pooling``, a dense one
by having no ``vocab_size``. And these work wherever torch-rechub's do, which goes by ``isinstance``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Initializer:
    """Makes a feature's table: ``initializer(vocab_size, embed_dim, padding_idx) -> nn.Embedding``.

    The padding row, where there is one, is zero.
    """

    def __call__(self, vocab_size: int, embed_dim: int, padding_idx: int | None = None) -> nn.Embedding:
        embed = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx)
        self.fill(embed.weight)
        if padding_idx is not None:
            nn.init.zeros_(embed.weight[padding_idx])
        return embed

    def fill(self, weight: Tensor) -> None:
        raise NotImplementedError


class RandomNormal(Initializer):
    """Normally distributed values."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std

    def fill(self, weight: Tensor) -> None:
        nn.init.normal_(weight, self.mean, self.std)


class RandomUniform(Initializer):
    """Values spread evenly over [minval, maxval)."""

    def __init__(self, minval: float = 0.0, maxval: float = 1.0):
        self.minval, self.maxval = minval, maxval

    def fill(self, weight: Tensor) -> None:
        nn.init.uniform_(weight, self.minval, self.maxval)


class XavierNormal(Initializer):
    """``torch.nn.init.xavier_normal_``."""

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def fill(self, weight: Tensor) -> None:
        nn.init.xavier_normal_(weight, self.gain)


class XavierUniform(Initializer):
    """``torch.nn.init.xavier_uniform_``."""

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def fill(self, weight: Tensor) -> None:
        nn.init.xavier_uniform_(weight, self.gain)


class Pretrained:
    """A table of given weights [vocab_size, embed_dim], trained on unless ``freeze``."""

    def __init__(self, embedding_weight: Any, freeze: bool = True):
        self.embedding_weight = torch.as_tensor(embedding_weight, dtype=torch.float32)
        self.freeze = freeze

    def __call__(self, vocab_size: int, embed_dim: int, padding_idx: int | None = None) -> nn.Embedding:
        if tuple(self.embedding_weight.shape) != (vocab_size, embed_dim):
            raise ValueError(
                f"Pretrained: embedding_weight must be [vocab_size, embed_dim] = [{vocab_size}, {embed_dim}], "
                f"got {list(self.embedding_weight.shape)}"
            )
        return nn.Embedding.from_pretrained(self.embedding_weight, freeze=self.freeze, padding_idx=padding_idx)


#: What becomes of ids that are no rows of their table: an error, one row for all of them, or a row by their hash.
OOV = ("error", "row", "hash")

#: Every table's initializer unless another is given: torch-rechub's.
DEFAULT_INITIALIZER = RandomNormal(0, 0.0001)


class _Feature:
    """An instance of torch-rechub's class of the same name, too, where torch-rechub has been imported: ``isinstance``
    asks an object for its ``__class__`` where its type does not answer."""

    @property
    def __class__(self):
        ours = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)  # of a subclass, too
        return getattr(sys.modules.get("torch_rechub.basic.features"), ours.__name__, type(self))

    def __reduce__(self):
        return object.__new__, (type(self),), vars(self)  # object's own would be of ``__class__``


class _TableFeature(_Feature):
    """A feature with a table. The table is made once and kept on the object: models that get the same feature object
    share its weights."""

    def __init__(self, name, vocab_size, embed_dim, shared_with, padding_idx, initializer, oov):
        if oov not in OOV:
            raise ValueError(f"feature {name!r}: oov must be one of {', '.join(OOV)}, got {oov!r}")
        if oov != "error" and padding_idx is not None and (oov == "row" or vocab_size < 2):
            if padding_idx % vocab_size == vocab_size - 1:
                raise ValueError(f"feature {name!r}: oov={oov!r} needs a row besides that of padding_idx {padding_idx}")
        self.name = name
        self.vocab_size = vocab_size
        # Wang et al., "Deep & Cross Network" (2017), section 3.1: 6 * categories^(1/4).
        self.embed_dim = int(6 * vocab_size**0.25) if embed_dim is None else embed_dim
        self.shared_with = shared_with
        self.padding_idx = padding_idx
        self.initializer = initializer
        self.oov = oov

    def __repr__(self):
        return f"<{type(self).__name__} {self.name} with Embedding shape ({self.vocab_size}, {self.embed_dim})>"

    def get_embedding_layer(self) -> nn.Embedding:
        if not hasattr(self, "embed"):
            self.embed = self.initializer(self.vocab_size, self.embed_dim, padding_idx=self.padding_idx)
        return self.embed


class SparseFeature(_TableFeature):
    """One category a sample: ids [B] into a table [vocab_size, embed_dim].

    Args:
        name: key of the ids in the batch, and of the table in ``EmbeddingLayer.embed_dict``.
        vocab_size: rows of the table.
        embed_dim: width; by default 6 * vocab_size^(1/4), rounded down.
        shared_with: name of the feature whose table this one uses instead of its own.
        padding_idx: the id whose row is zero and gets no gradient.
        initializer: makes the table.
        oov: what becomes of an id outside 0 .. vocab_size - 1. "error" raises an IndexError; "row" looks up the last
            row, so that a table with that use for it has one row more than there are known ids; "hash" looks up a row
            that depends on the id alone, never that of ``padding_idx``.

    Raises:
        ValueError: another ``oov``, or one whose row would be that of ``padding_idx``.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embed_dim: int | None = None,
        shared_with: str | None = None,
        padding_idx: int | None = None,
        initializer: Callable[..., nn.Embedding] = DEFAULT_INITIALIZER,
        oov: str = "error",
    ):
        super().__init__(name, vocab_size, embed_dim, shared_with, padding_idx, initializer, oov)


class SequenceFeature(_TableFeature):
    """A list of categories a sample: ids [B, L], padded; ``pooling`` is mean, sum or concat (none: [B, L, D]).

    The other arguments are ``SparseFeature``'s. Ids equal to the feature's own ``padding_idx`` are left out of the
    pooling, also where it uses another feature's table. ``weights`` is the key of numbers [B, L] in the batch that
    scale the ids' rows before they are pooled; a mean still divides by the number of ids. They may ask for gradients.

    Raises:
        ValueError: ``weights`` with another pooling than mean and sum.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        embed_dim: int | None = None,
        pooling: str = "mean",
        shared_with: str | None = None,
        padding_idx: int | None = None,
        initializer: Callable[..., nn.Embedding] = DEFAULT_INITIALIZER,
        weights: str | None = None,
        oov: str = "error",
    ):
        super().__init__(name, vocab_size, embed_dim, shared_with, padding_idx, initializer, oov)
        if weights is not None and pooling not in ("mean", "sum"):
            raise ValueError(f"SequenceFeature {name!r}: weights need pooling mean or sum, got {pooling!r}")
        self.pooling = pooling
        self.weights = weights


class DenseFeature(_Feature):
    """A number a sample, [B], or a vector of ``embed_dim`` numbers, [B, embed_dim]."""

    def __init__(self, name: str, embed_dim: int = 1):
        self.name = name
        self.embed_dim = embed_dim

    def __repr__(self):
        return f"<DenseFeature {self.name}>"


def is_dense(feature) -> bool:
    return not hasattr(feature, "vocab_size")


def is_sequence(feature) -> bool:
    return hasattr(feature, "pooling")


def check_features(owner: str, features: Iterable) -> None:
    """Raises a TypeError, in the name of ``owner``, for what is no feature, neither ours nor torch-rechub's."""
    for feature in features:
        if not (hasattr(feature, "name") and hasattr(feature, "embed_dim")):
            raise TypeError(
                f"{owner}: features must be SparseFeature, SequenceFeature or DenseFeature objects, got {feature!r}"
            )
        if not isinstance(feature.name, Hashable):
            raise TypeError(f"{owner}: a feature's name is a key of the batch, got {feature.name!r}")
