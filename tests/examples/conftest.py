"""The benchmarks are scripts: they import each other by name, from their own folder."""

import sys
from pathlib import Path

# Last: serving.py and training.py must not hide the packages of these names.
sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
