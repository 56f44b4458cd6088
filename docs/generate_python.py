"""Writes docs/python.md from the docstrings of the package in PYTHONPATH. tests/python/docs_test.py says when that is due."""
import inspect
import re
from pathlib import Path

import tokenyard

HEAD = """# The Python package

Made by `docs/generate_python.py` from docstrings. Letters in shapes: T tokens of this rank, H hidden size, K top_k, E experts, R ranks, L local experts, N rows received.
"""


def text_of(thing):
    """The docstring as paragraphs; of the C++ module's functions without the signatures that it begins with."""
    doc = inspect.getdoc(thing) or ""
    lines = [line for line in doc.splitlines() if not re.match(r"\w+\(.*\) -> ", line)]
    return re.sub(r"^\(self\) -> ", "", "\n".join(lines).strip()).replace("tokenyard._core.", "")


def signature(thing):
    try:
        found = str(inspect.signature(thing))
    except (ValueError, TypeError):
        first = (inspect.getdoc(thing) or "").splitlines()[:1]
        found = re.sub(r"^\w+", "", first[0]) if first and "(" in first[0] else "(...)"
    return re.sub(r"'(World|Pending|Received|RowGroups)( \| None)?'", r"\1\2", re.sub(r"tokenyard\.\w+\.", "", found).replace("self, ", "").replace("(self)", "()"))


def members(cls):
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property) or type(member).__name__ == "getset_descriptor":
            if text_of(member):
                yield f"`{name}`", text_of(member)
        elif callable(getattr(cls, name)):
            target = getattr(cls, name)
            yield f"`{name}{signature(target)}`", text_of(target)


def section(module, name):
    thing = getattr(module, name)
    title = f"{module.__name__}.{name}"
    if not inspect.isclass(thing):
        return [f"### {title}", f"`{name}{signature(thing)}`", text_of(thing)]
    lines = [f"### {title}", text_of(thing)]
    if not issubclass(thing, Exception):
        lines += [f"- {head}{': ' + ' '.join(doc.split()) if doc else ''}" for head, doc in members(thing)]
    return lines


def page():
    parts = [HEAD]
    for module in (tokenyard, tokenyard.parallel, tokenyard.weights, __import__("tokenyard.torch", fromlist=["torch"])):
        parts += [f"## {module.__name__}", inspect.getdoc(module) or ""]
        for name in module.__all__:
            if inspect.ismodule(getattr(module, name)):  # has its own section
                continue
            head, *rest = section(module, name)
            bullets = [line for line in rest if line.startswith("- ")]
            parts += [head, *(line for line in rest if line and not line.startswith("- "))]
            if bullets:
                parts.append("\n".join(bullets))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("python.md").write_text(page(), encoding="utf-8")
