"""The examples that need a GPU run."""
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

EXAMPLES = [path for path in sorted((Path(__file__).parents[2] / "examples").glob("*/main.py")) if "torch.cuda" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_example(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout, done.stderr
    print(done.stdout)
