"""What the models have in common: their lists of features, and a lookup by calling the embedding layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from rankkernels.nn.features import check_features, is_dense, is_sequence


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
