import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Kernels of rank threads wait for each other: streams that shared a hardware queue would never let the later one begin. Read when CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
