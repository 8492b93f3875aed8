"""Lets `python -m unittest` find the tests from the root, and the tests find common.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
