"""Builds the drop-in, unless DeepEP itself is installed here: both have one name, and files of one would replace those of the other."""
import sysconfig
from importlib.metadata import distributions

from setuptools import setup

paths = sysconfig.get_paths()
for other in distributions(path=sorted({paths["purelib"], paths["platlib"]})):
    if (other.metadata["Name"] or "").lower().replace("-", "_") == "deep_ep":
        raise SystemExit(f"DeepEP {other.version} is installed in {paths['purelib']}, and its package is named deep_ep, too: pip uninstall deep_ep first")
setup()
