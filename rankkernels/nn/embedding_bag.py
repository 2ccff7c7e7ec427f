"""Embedding bags as modules: torch's own interface for one table, and many tables in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._tables import TableLayer
from rankkernels.nn._transparency import is_plain
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops.embedding_bag import without_rest


class EmbeddingBag(TableLayer, nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag``, its arguments, parameters and numbers, on the fused op.

    Beyond torch's it takes per-sample weights with mode mean (the divisor stays the number of ids), int32 ids beside
    int64 offsets and the other way round, sparse gradients with mode max, and float16 and bfloat16 tables, summed in
    float32. Sparse gradients come coalesced. ``scale_grad_by_freq`` runs torch's own op.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """input [B, L], or [N] with offsets [B] ([B + 1] with ``include_last_offset``) -> [B, embedding_dim].

        Raises:
            IndexError: an id outside the table.
            ValueError: offsets beside 2-D input, or none beside 1-D input, or an empty list of them with
                ``include_last_offset``.
            RuntimeError: shapes or dtypes that do not fit, offsets that decrease or end beyond the ids.
        """
        if self.scale_grad_by_freq:
            return super().forward(input, offsets, per_sample_weights)
        if (input.dim() == 2) == (offsets is not None):
            raise ValueError(
                f"EmbeddingBag: input must be [B, L] without offsets or [N] with them, got shape {list(input.shape)} "
                f"and {'none' if offsets is None else list(offsets.shape)}"
            )
        if self.include_last_offset and offsets is not None and offsets.numel() == 0:
            raise ValueError("EmbeddingBag: with include_last_offset, offsets must be [B + 1], got [0]")
        if self.max_norm is not None:
            with torch.no_grad():
                # Of no columns: raises what there is to raise, reads no row and writes nothing.
                self._look_up(self.weight[:, :0], input, offsets, per_sample_weights)
                torch.embedding_renorm_(self.weight.detach(), input.contiguous().long(), self.max_norm, self.norm_type)
        if self.include_last_offset and offsets is not None and (self.sparse or self.fused_optimizer):
            # Ids after the last bag: dense gradients take no notice of their zeros, a step on their rows would.
            input, per_sample_weights = without_rest(self.weight, input, offsets, per_sample_weights)
        out = self._look_up(self.weight, input, offsets, per_sample_weights)
        # The last offset ends the last bag: what comes after it is a bag of its own to the op.
        return out[:-1] if self.include_last_offset and offsets is not None else out

    def _look_up(
        self, weight: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Tensor:
        (out,) = ops.table_batched_embedding_bag(
            [weight],
            [input],
            modes=[self.mode],
            offsets=[offsets],
            per_sample_weights=[per_sample_weights],
            padding_idx=[self.padding_idx],
            frozen_rows=[self.padding_idx],
            names=["input"],
            sparse=self.sparse,
            optimizer=self.fused_optimizer,
        )
        return out


class _Tables(nn.ParameterList, nn.EmbeddingBag):
    """A ParameterList. DistributedDataParallel expects sparse gradients of torch's own embedding modules alone: it goes
    by that type and ``sparse``, so this list has them."""

    def __init__(self, values: Iterable[nn.Parameter] = (), sparse: bool = False):
        nn.Module.__init__(self)  # the other base would make a table
        self._size, self.sparse = 0, sparse
        self.extend(values)

    def __getattr__(self, name: str):
        """Loops over all embedding modules ask for ``weight``: one table is that, of several there is none."""
        if name == "weight" and len(self) == 1:
            return self[0]
        if name == "weight":
            raise AttributeError(f"TableBatchedEmbeddingBag: no one weight, but {len(self)} tables: go over .weights")
        return super().__getattr__(name)


class TableBatchedEmbeddingBag(TableLayer):
    """Many tables, looked up in one call.

    Args:
        num_embeddings: the rows of each table.
        embedding_dims: the width of each table, or one for all.
        modes: "sum", "mean", "max" or "none" (each id on its own) of each feature, or one for all.
        tables: the table of each feature; one each, in order, by default. Features may share a table.
        padding_idx: of each table, the row that is zero at first, gets no gradient and is left out of the pooling;
            one for all, or None.
        names: of each feature, for error messages.
        concat: return one tensor and not a list. Features of mode none must then have 1-D ids.
        sparse: give the tables sparse gradients, coalesced.

    The tables are ``weights.0``, ``weights.1``, ... and start out as standard normal numbers, as in
    ``torch.nn.EmbeddingBag``.

    Raises:
        ValueError: lists of lengths that do not fit.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dims: Sequence[int] | int,
        *,
        modes: Sequence[str] | str = "sum",
        tables: Sequence[int] | None = None,
        padding_idx: Sequence[int | None] | int | None = None,
        names: Sequence[str] | None = None,
        concat: bool = True,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        T = len(num_embeddings)
        self.tables = list(range(T)) if tables is None else list(tables)
        F = len(self.tables)
        dims = self._each("embedding_dims", embedding_dims, int, T)
        self.padding_idx = self._each("padding_idx", padding_idx, (int, type(None)), T)
        self.modes = self._each("modes", modes, str, F)
        self.names = [f"indices[{f}]" for f in range(F)] if names is None else self._each("names", names, (), F)
        if not all(0 <= t < T for t in self.tables):
            raise ValueError(f"TableBatchedEmbeddingBag: tables must be in 0 .. {T - 1}, got {self.tables}")
        self.concat = concat
        self.weights = _Tables(
            (nn.Parameter(torch.empty(r, d, device=device, dtype=dtype)) for r, d in zip(num_embeddings, dims)), sparse
        )
        self.reset_parameters()

    @staticmethod
    def _each(name: str, values, one: type | tuple[type, ...], count: int) -> list:
        values = [values] * count if isinstance(values, one) else list(values)
        if len(values) != count:
            raise ValueError(f"TableBatchedEmbeddingBag: {name} must have {count} entries, got {len(values)}")
        return values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight, padding_idx in zip(self.weights, self.padding_idx):
            nn.init.normal_(weight)
            if padding_idx is not None:
                weight[padding_idx].zero_()
            use_huge_pages(weight)

    def forward(
        self,
        indices: Sequence[Tensor],
        offsets: Sequence[Tensor | None] | None = None,
        per_sample_weights: Sequence[Tensor | None] | None = None,
    ) -> Tensor | list[Tensor]:
        """One tensor of ids a feature: [B, L], [N] beside its offsets [B], any shape for mode none.

        Returns:
            [B, sum of the features' widths], or without ``concat`` one tensor a feature, [B, D] or, for mode none,
            indices.shape + [D].

        Raises:
            IndexError, RuntimeError: see ``rankkernels.table_batched_embedding_bag``.
        """
        weights = self.weights._parameters.values()  # the list's own iterator takes as long as the op for one id
        if not is_plain(self.weights, _Tables) or len(weights) != len(self.weights):  # pruned, parametrized, sharded
            weights = self.weights
        out = ops.table_batched_embedding_bag(
            list(weights),
            indices,
            modes=self.modes,
            tables=self.tables,
            offsets=offsets,
            per_sample_weights=per_sample_weights,
            padding_idx=[self.padding_idx[t] for t in self.tables],
            frozen_rows=self.padding_idx,
            names=self.names,
            concat=self.concat,
            sparse=self.weights.sparse,
            optimizer=self.fused_optimizer,
        )
        return out[0] if self.concat else out

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{w.size(0)} x {w.size(1)}" for w in self.weights)
        return f"{shapes}, modes={self.modes}, tables={self.tables}"
