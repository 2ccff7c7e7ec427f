"""Batches in which samples share users: what is a user's has a row a user, and ``user_index`` says which is whose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn.features import is_dense
from rankkernels.ops._tracing import is_traced
from rankkernels.ops.linear import linear as faster_linear


def check_user_features(model: str, user_features: Iterable, features: Sequence) -> tuple[str, ...]:
    """The names of ``user_features``, names or features themselves, which must be among ``features``."""
    names = tuple(f if isinstance(f, str) else f.name for f in user_features)
    known = {f.name for f in features}
    for name in names:
        if name not in known:
            raise ValueError(f"{model}: user feature {name!r} is not among {', '.join(sorted(known)) or 'no features'}")
    return names


def check_batch(
    model: str, x: Mapping[str, Tensor], features: Sequence, users: Collection[str], user_index: Tensor
) -> None:
    """Raises unless ``users``, names of features, have one number of rows, and the others one for each sample."""
    if user_index.dim() != 1 or user_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{model}: user_index must be [B] of int32 or int64, got {list(user_index.shape)} {user_index.dtype}"
        )
    first: dict[bool, tuple[str, int]] = {False: ("user_index", user_index.size(0))}
    for feature in features:
        value = x.get(feature.name)
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue  # the embedding layer says so
        of_user = feature.name in users
        name, size = first.setdefault(of_user, (feature.name, value.size(0)))
        if value.size(0) != size:
            raise ValueError(
                f"{model}: feature {feature.name!r} must have a row for each {'user' if of_user else 'sample'}, {size} "
                f"as {name!r} has, got shape {list(value.shape)}"
            )


def of_samples(of_users: Sequence[Tensor], user_index: Tensor) -> list[Tensor]:
    """Of each tensor [U, n] the row of each sample's user, [B, n]. A lookup: its backward adds rows up in C++."""
    if not of_users:
        return []
    numbers = list(range(len(of_users)))
    return ops.table_batched_embedding_bag(
        of_users,
        [user_index] * len(of_users),
        modes=["none"] * len(of_users),
        tables=numbers,
        names=["user_index"] * len(of_users),
    )


def copied(
    features: Sequence, embeddings: Sequence[Tensor], users: Collection[str], user_index: Tensor
) -> list[Tensor]:
    """The embeddings of ``features`` [., n] with a row for each sample."""
    found = iter(of_samples([e for f, e in zip(features, embeddings) if f.name in users], user_index))
    return [next(found) if f.name in users else e for f, e in zip(features, embeddings)]


def fm_and_linear(
    features: Sequence, embeddings: Sequence[Tensor], weight: Tensor, users: Collection[str], user_index: Tensor
) -> Tensor:
    """FM plus linear term [B, 1] of embeddings [U, D] or [B, D]; ``weight`` is the linear layer's [1, F D].

    FM is half of the difference of the sum's square and the squares' sum, so that of both sides together is
    fm(user) + fm(sample) + <sum of user, sum of sample>.
    """
    weights, sides = weight.view(len(features), -1), {}
    for of_user in (True, False):
        kept = [i for i, f in enumerate(features) if (f.name in users) == of_user]
        if kept:
            e = torch.stack([embeddings[i] for i in kept], dim=1)
            sides[of_user] = ops.fm_interaction(e) + F.linear(e.flatten(1), weights[kept].view(1, -1)), e.sum(1)
    if True in sides:
        sides[True] = of_samples(sides[True], user_index)
    if len(sides) == 1:
        return next(iter(sides.values()))[0]
    (of_user, user_sum), (of_sample, sample_sum) = sides.values()
    return of_user + of_sample + (user_sum * sample_sum).sum(1, keepdim=True)


def first_layer(
    features: Sequence, embeddings: Sequence[Tensor], linear: nn.Linear, users: Collection[str], user_index: Tensor
) -> Tensor:
    """``linear`` [B, H] of what ``arrange`` makes of the features' embeddings: tables' first, then dense values."""
    ordered = sorted(zip(features, embeddings), key=lambda pair: is_dense(pair[0]))
    columns = linear.weight.split([e.flatten(1).size(1) for _, e in ordered], dim=1)
    out, bias, product = None, linear.bias, F.linear if is_traced() else faster_linear
    for of_user in (True, False):
        kept = [(e.flatten(1), w) for (f, e), w in zip(ordered, columns) if (f.name in users) == of_user]
        if not kept:
            continue
        x, w = (torch.cat(parts, dim=1) for parts in zip(*kept))
        part, bias = product(x, w, bias), None
        if of_user:
            (part,) = of_samples([part], user_index)
        out = part if out is None else out + part
    return out
