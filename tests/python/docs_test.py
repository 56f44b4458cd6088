"""docs/python.md says what the docstrings say, and everything public has one."""
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenyard as ty
from support import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("module", [ty, ty.parallel, ty.weights], ids=lambda module: module.__name__)
def test_everything_public_is_documented(module):
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), f"{module.__name__}.{name} has no docstring"
        for member, value in vars(thing).items() if inspect.isclass(thing) and thing.__module__ != "tokenyard._core" else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, (property, staticmethod))):
                assert inspect.getdoc(getattr(thing, member)), f"{module.__name__}.{name}.{member} has no docstring"


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_python", DOCS / "generate_python.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.page() == (DOCS / "python.md").read_text(encoding="utf-8"), "run docs/generate_python.py, as its first lines say"


def test_stubs_name_the_whole_module():
    from tokenyard import _core

    stub = Path(_core.__file__).with_name("_core.pyi").read_text(encoding="utf-8")
    assert all(f"class {name}" in stub or f"def {name}" in stub for name in dir(_core) if not name.startswith("_"))
    code = f"import ast; ast.parse({stub!r})"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
