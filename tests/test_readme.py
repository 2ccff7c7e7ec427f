"""The README's examples run as they stand, in one session from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples():
    session: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    assert session["p"].shape == (2,) and session["y"].shape == (4096, 1)
