"""wheel.py <source> <scratch>: builds a wheel without a network, unpacks it, and runs what README.md shows with it alone."""
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
wheels, target = scratch / "wheels", scratch / "installed"
for folder in (wheels, target):
    shutil.rmtree(folder, ignore_errors=True)
pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, source], check=True)
subprocess.run([*pip, "install", "--no-deps", "--target", target, next(wheels.glob("tokenyard-*.whl"))], check=True)
drop_in = scratch / "drop_in"  # built in a copy: setuptools leaves its folders beside its sources
shutil.rmtree(drop_in, ignore_errors=True)
shutil.copytree(source / "python", drop_in, ignore=shutil.ignore_patterns("__pycache__"))
subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, drop_in], check=True)
subprocess.run([*pip, "install", "--no-deps", "--target", target, next(wheels.glob("tokenyard_deep_ep-*.whl"))], check=True)
assert (target / "deep_ep" / "utils" / "math.py").exists() and (target / "deep_ep_cpp").is_dir()
assert {"py.typed", "_core.pyi"} <= {path.name for path in (target / "tokenyard").iterdir()}, "type information is missing"
programs = re.findall(r"```python\n(.*?)```", (source / "README.md").read_text(encoding="utf-8"), re.DOTALL)
assert programs, "README.md shows no Python"
for i, program in enumerate(programs):
    if "import torch" in program and find_spec("torch") is None:
        print(f"wheel: program {i} of README.md left out: torch is not installed")
        continue
    path = scratch / f"readme_{i}.py"
    path.write_text(program, encoding="utf-8")
    subprocess.run([sys.executable, path], check=True, env={**os.environ, "PYTHONPATH": str(target)}, cwd=scratch, timeout=120)
    print(f"wheel: program {i} of README.md ran with the installed package")
