"""So that `python -m unittest` finds the tests from the root of the repository, and they find common.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
