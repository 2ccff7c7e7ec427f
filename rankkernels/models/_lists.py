"""What the models have in common: their lists of features, and a lookup by calling the embedding layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from rankkernels.nn._transparency import is_plain
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import check_features, is_dense, is_sequence
from rankkernels.nn.lookup_plan import arrange


def check_lists(model: str, **lists: Sequence) -> None:
    for name, features in lists.items():
        if not features:
            raise ValueError(f"{model}: {name} must not be empty")
        check_features(model, features)


def check_one_width(model: str, **lists: Sequence) -> None:
    """Raises unless each list has features with embeddings of one width, [B, D] each."""
    check_lists(model, **lists)
    for name, features in lists.items():
        for feature in features:
            if is_dense(feature):
                raise ValueError(f"{model}: {name} must have embeddings, {feature.name!r} is a dense feature")
            if feature.embed_dim != features[0].embed_dim:
                raise ValueError(
                    f"{model}: {name} must have one embed_dim, {features[0].name!r} has {features[0].embed_dim} and "
                    f"{feature.name!r} has {feature.embed_dim}"
                )
            check_pooled(model, feature)


def check_histories(model: str, histories: Sequence, targets: Sequence) -> None:
    """Raises unless ``histories`` are sequences [B, L, D] and ``targets`` of one id a sample."""
    for feature in targets:
        if is_dense(feature) or is_sequence(feature):
            raise ValueError(f"{model}: target feature {feature.name!r} must be a sparse feature, got {feature!r}")
    for history in histories:
        if getattr(history, "pooling", None) != "concat":
            raise ValueError(
                f"{model}: history feature {history.name!r} must be a sequence feature with pooling='concat', "
                f"got {history!r} with pooling {getattr(history, 'pooling', None)!r}"
            )


def look_up(
    embedding: nn.Module, x: Mapping[str, Tensor], lists: Sequence[Sequence], users: Collection[str] = ()
) -> list[list[Tensor]]:
    """One tensor a feature of each list: all looked up in one call, or by calling ``embedding`` list by list where that
    may be seen. ``users``: names of the features that have a row a user."""
    if is_plain(embedding, EmbeddingLayer):
        found = embedding.lookup(x, list(chain(*lists)), one_batch=not users)
    else:
        found = [e for features in lists for e in called(embedding, x, features, users)]
    embeddings = iter(found)
    return [[next(embeddings) for _ in features] for features in lists]


def look_up_arranged(
    embedding: nn.Module, x: Mapping[str, Tensor], lists: Sequence[Sequence], squeeze_dim: Sequence[bool]
) -> list[Tensor]:
    """``embedding(x, features, squeeze_dim)`` of each list, with all looked up in one call where nobody could tell."""
    if is_plain(embedding, EmbeddingLayer):
        return [arrange(*each) for each in zip(lists, look_up(embedding, x, lists), squeeze_dim)]
    return [embedding(x, features, squeeze_dim=squeeze) for features, squeeze in zip(lists, squeeze_dim)]


def look_up_beside(
    embedding: nn.Module, x: Mapping[str, Tensor], context: Sequence, lists: Sequence[Sequence]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """``look_up`` of ``lists``, and of the features ``context`` what an MLP takes of them: one tensor [B, n], or none
    where there are no such features."""
    if is_plain(embedding, EmbeddingLayer):
        of_context, *found = look_up(embedding, x, [context, *lists])
        return ([arrange(context, of_context, squeeze_dim=True)] if context else []), found
    flat = [embedding(x, context, squeeze_dim=True)] if context else []
    return flat, look_up(embedding, x, lists)


def called(
    embedding: nn.Module, x: Mapping[str, Tensor], features: Sequence, users: Collection[str] = ()
) -> list[Tensor]:
    """One tensor a feature by calling ``embedding``: once, as torch-rechub does, or once each where their shapes
    differ."""
    shapes = [
        (is_dense(f), f.embed_dim, _length(x, f), f.name in users) for f in features
    ]  # while exporting no set can have them
    if all(shape == shapes[0] for shape in shapes[1:]) and features and not is_dense(features[0]):
        return list(embedding(x, features).unbind(1))
    return [embedding(x, [f], squeeze_dim=True) if is_dense(f) else embedding(x, [f]).squeeze(1) for f in features]


def _length(x: Mapping[str, Tensor], feature) -> int:
    """Of a sequence that is not pooled, L; 0 of other features."""
    return x[feature.name].shape[1] if is_sequence(feature) and feature.pooling == "concat" else 0


def check_pooled(model: str, feature) -> None:
    if is_sequence(feature) and feature.pooling == "concat":
        raise ValueError(
            f"{model}: feature {feature.name!r} has pooling='concat', a tensor [B, L, D] that no MLP can take: "
            "pool it with 'mean' or 'sum'"
        )
