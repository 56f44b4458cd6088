"""The Python examples run, and README.md shows the first letter for letter. Those that need a GPU: cuda_example_test.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*/main.py")) if "torch.cuda" not in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_example(path):
    if "torch" in path.read_text(encoding="utf-8") and torch is None:
        pytest.skip("torch is not installed")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout, done.stderr
    print(done.stdout)


def test_the_first_is_there_and_in_the_readme():
    assert f"```python\n{EXAMPLES[0].read_text(encoding='utf-8')}```" in (ROOT / "README.md").read_text(encoding="utf-8")
