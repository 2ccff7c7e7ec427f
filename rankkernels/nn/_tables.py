"""What layers of embedding tables have in common."""

from __future__ import annotations

from torch import nn

from rankkernels.ops import _exact_table


class TableLayer(nn.Module):
    """A layer that looks tables up, and lets an optimizer step on them in the backward."""

    fused_optimizer = None  # see rankkernels.optim.fuse

    def train(self, mode: bool = True):
        """As of any module. Leaving training brings all rows up to date that lag behind ``optim.Adam(exact=True)``."""
        if not mode and _exact_table.in_use:
            _exact_table.flush_tables(self.parameters())
        return super().train(mode)
