"""What a table optimizer asks of a state_dict before it reads it."""

from __future__ import annotations


def check_form(optimizer: str, state_dict: object) -> None:
    """Raises a ValueError, in the name of ``optimizer``, for what is built otherwise than a state_dict."""
    state, groups = (state_dict.get(n) if isinstance(state_dict, dict) else None for n in ("state", "param_groups"))
    if not (
        isinstance(state, dict)
        and isinstance(groups, (list, tuple))
        and all(isinstance(each, dict) for each in (*state.values(), *groups))
        and all(isinstance(group.get("params"), (list, tuple)) for group in groups)
    ):
        raise ValueError(
            f"{optimizer}: the state to load must be what state_dict() gives: a dict with state, a dict of a dict a "
            "table, and param_groups, a list of dicts with a list of params each"
        )
