"""The example app is found by its modules' names, as when it is started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs/examples/serving"))
