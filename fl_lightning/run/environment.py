"""Records versions, commit, machine and command of a run."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fl_lightning

#: Libraries whose version may change a result.
LIBRARIES = ("torchvision", "lightning", "torchmetrics", "timm", "numpy", "scikit-learn")


VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Variables of the system by which kernels, their instructions and threads are chosen."""


def environment() -> dict[str, str]:
    """Return what a run is made with, in words: libraries, commit of the source, Python, machine, accelerator, command.

    The last bits of a result depend on versions, and on ``cpu`` (instructions that kernels are chosen by), ``threads``
    (how sums are split), ``kernels`` (libraries for convolutions and matrices, with their versions) and ``variables``
    (of :data:`VARIABLES`, by which these are chosen): where one of them differs, the same run ends with other last
    digits, and after many rounds with others than the last.

    What cannot be known (the commit, outside a checkout; a library that is not installed) is left out.
    """
    found = {"fl_lightning": fl_lightning.__version__, "commit": _commit(), "python": platform.python_version()}
    found["torch"] = torch.__version__  # with its build, which the package's metadata leave out
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    found["cpu"] = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}".removeprefix(", ")
    found["threads"] = str(torch.get_num_threads())
    found["kernels"] = kernels()
    found["variables"] = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name))
    if torch.cuda.is_available():
        found["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    found["command"] = shlex.join(sys.argv)
    return {key: value for key, value in found.items() if value}


@cache
def kernels() -> str:
    """Return the libraries that torch computes with, with their versions where it says them."""
    backends = {"mkldnn": torch.backends.mkldnn, "mkl": torch.backends.mkl, "openmp": torch.backends.openmp}
    there = [name for name, backend in backends.items() if backend.is_available()]
    named = {"mkldnn": r"MKL-DNN v([\d.]+)", "mkl": r"Math Kernel Library Version ([\d.]+)"}
    words = []
    for name in there:
        version_of = re.search(named.get(name, "(?!)"), torch.__config__.show())
        words.append(f"{name} {version_of.group(1)}" if version_of else name)
    return ", ".join(words)


@cache
def _processor() -> str:
    """Return the name of the processor; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@cache
def _commit() -> str:
    root = Path(fl_lightning.__file__).parents[1]
    if not (root / ".git").exists():  # installed, perhaps into a folder of somebody else's repository
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
