"""DeepCTR-Torch: its layers and models keep their classes as bases, and do what they did where a kernel does not.

Every class here has the name of the one that it derives from. A forward that is not fused (a module was replaced or
may see its call, another dtype, an ONNX export) is theirs.
"""

from __future__ import annotations

import torch
from deepctr_torch import models
from deepctr_torch.inputs import DenseFeat
from deepctr_torch.layers import activation, core, interaction, sequence
from deepctr_torch.models import basemodel
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.adoption._deepctr_lookup import Lookups, by_group, dense_columns, of_tables
from rankkernels.adoption._report import why_subclass_is_left
from rankkernels.nn._transparency import is_plain
from rankkernels.nn.attention import FusedMLP, HiddenLayer, fused_mlp
from rankkernels.nn.batch_norm import group_of
from rankkernels.nn.layers import BatchNormDice, run_layers
from rankkernels.ops._tracing import is_tensor, is_traced, is_transformed

LIBRARY = "DeepCTR-Torch"

#: Those that torch has fused on the CPU.
_FUSED_OPTIMIZERS = torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad


class FM(interaction.FM):
    def forward(self, inputs: Tensor) -> Tensor:
        return ops.fm_interaction(inputs) if inputs.dim() == 3 else super().forward(inputs)


class BiInteractionPooling(interaction.BiInteractionPooling):
    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 3:
            return super().forward(inputs)
        return ops.fm_interaction(inputs, reduce_sum=False).unsqueeze(1)


class Dice(BatchNormDice, activation.Dice):
    def is_served(self) -> bool:
        return super().is_served() and is_plain(self.sigmoid, nn.Sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if x.dim() != self.dim or x.size(-1) != self.bn.num_features or not self.is_served():
            return super().forward(x)
        if rows < 2 and group_of(self.bn) is None:
            return super().forward(x)
        return self.of_rows(x.reshape(rows, -1)).view(x.shape)


class DNN(core.DNN):
    def forward(self, inputs: Tensor) -> Tensor:
        modules = []
        for i, linear in enumerate(self.linears):
            modules += [linear, *([self.bn[i]] if self.use_bn else ()), self.activation_layers[i], self.dropout]
        return run_layers(modules, inputs)


class LocalActivationUnit(core.LocalActivationUnit):
    def fused(self, query: Tensor, user_behavior: Tensor) -> FusedMLP | None:
        """The MLP for the op, where it does what ``forward`` would: query [B, 1, D], user_behavior [B, L, D]."""
        if not (is_tensor(query) and is_tensor(user_behavior)) or query.dim() != 3 or user_behavior.dim() != 3:
            return None
        if query.size(1) != 1 or query.size(0) != user_behavior.size(0):
            return None
        dnn = self.dnn
        if not is_plain(dnn, DNN) or dnn.use_bn or query.dtype != user_behavior.dtype:  # use_bn is over positions
            return None
        layers = []
        for linear, act in zip(dnn.linears, dnn.activation_layers):
            if isinstance(act, Dice) and act.dim != 3:
                return None
            layers.append(HiddenLayer(linear, None, None if is_plain(act, activation.Identity) else act, dnn.dropout))
        mlp = fused_mlp(layers, self.dense)
        fits = mlp and mlp.params[0].size(1) == 4 * query.size(2) == 4 * user_behavior.size(2)
        return mlp if fits and mlp.params[-2].size(0) == 1 else None

    def forward(self, query: Tensor, user_behavior: Tensor) -> Tensor:
        mlp = self.fused(query, user_behavior)
        if mlp is None or not mlp.has_kernel(user_behavior, return_scores=True):
            return super().forward(query, user_behavior)
        return mlp.attend(user_behavior, query.squeeze(1), return_scores=True).unsqueeze(2)


class AttentionSequencePoolingLayer(sequence.AttentionSequencePoolingLayer):
    def _valid_rows(self, keys: Tensor, keys_length: Tensor, mask: Tensor | None) -> dict[str, Tensor] | None:
        """What says which rows are valid, as the op takes it."""
        B, L = keys.shape[:2]
        if self.supports_masking:
            fits = mask is not None and mask.dtype == torch.bool and mask.shape == (B, L)
            return {"mask": mask} if fits else None
        fits = keys_length.dtype in (torch.int32, torch.int64) and keys_length.numel() == B
        return {"lengths": keys_length.view(-1).clamp(0, L)} if fits else None

    def forward(self, query: Tensor, keys: Tensor, keys_length: Tensor, mask: Tensor | None = None) -> Tensor:
        unit = self.local_att
        mlp = unit.fused(query, keys) if is_plain(unit, LocalActivationUnit) else None
        rows = None if mlp is None else self._valid_rows(keys, keys_length, mask)
        options = {"use_softmax": self.weight_normalization, "count_padding": True, "return_scores": self.return_score}
        if rows is None or not mlp.has_kernel(keys, **options):
            return super().forward(query, keys, keys_length, mask)
        return mlp.attend(keys, query.squeeze(1), **rows, **options).unsqueeze(1)


class Linear(Lookups, basemodel.Linear):
    def forward(self, X: Tensor, sparse_feat_refine_weight: Tensor | None = None) -> Tensor:
        columns = [*self.sparse_feature_columns, *self.varlen_sparse_feature_columns]
        embeddings = self.concatenated(X, columns)
        if embeddings is None:
            return super().forward(X, sparse_feat_refine_weight)
        if sparse_feat_refine_weight is not None:
            embeddings = embeddings * sparse_feat_refine_weight
        logit = embeddings.sum(1, keepdim=True)
        if self.dense_feature_columns:
            logit = logit + dense_columns(X, self.dense_feature_columns, self.feature_index) @ self.weight
        return logit


class _SumOfSquares(torch.autograd.Function):
    """factor sum_i |w_i|^2 of all tensors, [1]: the squares of a table are neither kept nor made a second time."""

    @staticmethod
    def forward(ctx, factor: float, *tensors: Tensor) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(*tensors)
        return factor * torch.stack(torch._foreach_norm(tensors)).square().sum(0, keepdim=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        twice = 2 * ctx.factor * grad.squeeze(0)
        needed = ctx.needs_input_grad[1:]
        return None, *(w * twice if need else None for w, need in zip(ctx.saved_tensors, needed))


class _Model(Lookups):
    """What all of their models have of ``BaseModel``."""

    def input_from_feature_columns(self, X, feature_columns, embedding_dict, support_dense=True):
        dense = [c for c in feature_columns if isinstance(c, DenseFeat)]
        found = None
        if embedding_dict is self.embedding_dict and (support_dense or not dense):
            found = self.looked_up(X, of_tables(feature_columns))
        if found is None:
            return super().input_from_feature_columns(X, feature_columns, embedding_dict, support_dense)
        return found, [X[:, slice(*self.feature_index[c.name])] for c in dense]

    def _get_optim(self, optimizer: str | torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What ``compile`` makes of a name: on the CPU torch's own optimizer in its fused form, a pass over each tensor
        and its state and not ten."""
        made = super()._get_optim(optimizer)
        if made is optimizer or type(made) not in _FUSED_OPTIMIZERS or not all(p.is_cpu for p in self.parameters()):
            return made
        return type(made)(self.parameters(), lr=made.defaults["lr"], fused=True)

    def get_regularization_loss(self) -> Tensor:
        weights = [
            ([w[1] if isinstance(w, tuple) else w for w in listed], l1, l2)
            for listed, l1, l2 in self.regularization_weight
        ]
        everything = [w for tensors, *_ in weights for w in tensors]
        alike = len({(w.dtype, w.device) for w in everything}) < 2
        if is_traced() or is_transformed() or not alike or not all(map(is_tensor, everything)):
            return super().get_regularization_loss()
        total = torch.zeros((1,), device=self.device)
        for tensors, l1, l2 in weights:
            if l1 > 0:
                for w in tensors:
                    total += torch.sum(l1 * torch.abs(w))
            if l2 > 0 and tensors:
                total += _SumOfSquares.apply(l2, *tensors)
        return total


class DeepFM(_Model, models.DeepFM):
    def forward(self, X: Tensor) -> Tensor:
        together = None
        if not self.use_fm or is_plain(self.fm, FM):
            together = self.with_dense(X, self.dnn_feature_columns, self.use_fm)
        if together is None:
            return super().forward(X)
        dnn_input, fm = together
        logit = self.linear_model(X)
        if fm is not None:
            logit = logit + fm
        if self.use_dnn:
            logit = logit + self.dnn_linear(self.dnn(dnn_input))
        return self.out(logit)


class DIN(_Model, models.DIN):
    def forward(self, X: Tensor) -> Tensor:
        sparse, histories = self.sparse_feature_columns, self.history_feature_columns
        lengths = [c.length_name for c in self.varlen_sparse_feature_columns if c.length_name is not None]
        targets = [c.name for c in sparse if c.name in self.history_feature_list]
        if not (lengths and histories and targets):
            return super().forward(X)
        found = self.looked_up(X, [*sparse, *self.sparse_varlen_feature_columns], histories)
        if found is None:
            return super().forward(X)
        keys = found[-len(histories) :]
        pairs = by_group(sparse, found[: len(sparse)])
        pooled = found[len(sparse) : -len(histories)]
        query = torch.cat([e for c, e in pairs if c.name in targets], -1)
        keys = torch.cat([e for _, e in by_group(histories, keys)], -1) if len(keys) > 1 else keys[0]
        length = X[:, slice(*self.feature_index[lengths[0]])].long().squeeze(1)
        hist = self.attention(query, keys, length)
        dense = [c for c in self.dnn_feature_columns if isinstance(c, DenseFeat)]
        parts = [e.flatten(1) for e in (*(e for _, e in pairs), *pooled, hist)]
        if dense:
            parts.append(dense_columns(X, dense, self.feature_index))
        return self.out(self.dnn_linear(self.dnn(torch.cat(parts, 1))))


_LAYERS = FM, BiInteractionPooling, Dice, DNN, LocalActivationUnit, AttentionSequencePoolingLayer, Linear, DeepFM, DIN
#: Ours by the class that it derives from.
_NAMESAKES = {cls.__bases__[-1]: cls for cls in _LAYERS}
# Of their other models the lookups are fused. Pickle finds the classes by their names.
for _theirs in vars(models).values():
    if isinstance(_theirs, type) and _theirs not in _NAMESAKES:
        _names = {"__module__": __name__, "__doc__": _theirs.__doc__}
        globals()[_theirs.__name__] = _NAMESAKES[_theirs] = type(_theirs.__name__, (_Model, _theirs), _names)


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of theirs."""
    cls = type(module)
    if (ours := _NAMESAKES.get(cls)) is not None:
        return ours
    if cls.__module__.startswith("deepctr_torch."):
        return "no kernel for it"
    return why_subclass_is_left(cls, _NAMESAKES)
