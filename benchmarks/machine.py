"""What a benchmark's table must say of where it was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> str:
    """Return one line: processor, cores, Python, and the versions of `packages`."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}" + f", {versions}" * bool(versions)
