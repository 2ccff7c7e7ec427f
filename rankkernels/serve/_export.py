"""A frozen model as a module that leaves Python: by torch.export to AOTInductor, and to ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankkernels.ops._rank_plan import Plan, dequantized, split
from rankkernels.ops.rank import Request, run_op
from rankkernels.serve import _frozen


class RankModule(nn.Module):
    """``FrozenModel.rank`` without ``k``, as ``forward(user, candidates)`` on tensors alone: int64 or int32 ids,
    float32 numbers. Which features are the user's is fixed by the example that is exported.

    torch.export gets the op ``rank``, on the tables as they are stored. Exporters to ONNX get torch's own operators, on
    the codes of the tables; there an id outside its table is whatever the runtime makes of it.
    """

    def __init__(self, frozen: _frozen.FrozenModel):
        super().__init__()
        self.frozen, self.plan_of_numbers = frozen, Plan.decode(frozen.plan)
        for i, table in enumerate(frozen.tables):
            self.register_buffer(f"table_{i}", table)
        self.register_buffer("weights", frozen.weights)
        self.register_buffer("plan", frozen.plan)
        # No buffers: an exporter that does not read them leaves them out.
        self._parts = [split(t, table) for t, table in zip(frozen.tables, self.plan_of_numbers.tables)]

    def forward(self, user: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        """Scores [C], as ``FrozenModel.rank`` gives them."""
        inputs, sides = [], []
        for name, dtype in self.frozen.dtypes:
            of_user = name not in candidates
            value = (user if of_user else candidates).get(name)
            inputs.append(_frozen.value_of(name, dtype, value, (user, candidates)))
            sides.append(int(of_user))
        if all(sides):
            raise KeyError(f"rank: candidates must have one of the model's features {list(self.frozen.inputs)}")
        C = inputs[sides.index(0)].size(0)
        tables = [self._buffers[f"table_{i}"] for i in range(len(self._parts))]
        if not torch.onnx.is_in_onnx_export():
            return run_op(inputs, sides, tables, self.weights, self.plan, self.frozen.names, C)
        plan = self.plan_of_numbers

        def rows_of(t: int, ids: Tensor) -> Tensor:
            return dequantized([part[ids] for part in self._parts[t]], plan.tables[t])

        return Request(inputs, sides, rows_of, self.weights, plan, C).scores()
