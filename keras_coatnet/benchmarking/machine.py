"""What is known of the machine that something is timed on."""

from __future__ import annotations

import os
import pathlib
import platform
import sys

# Of each kind of instruction the best first: for vectors, for bfloat16, for products of eight bits.
_KINDS = (
    ("avx512f", "avx2", "avx", "sve", "asimd"),
    ("amx_bf16", "avx512_bf16", "bf16"),
    ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"),
)


def describe_machine() -> str:
    """Returns the processor with its instruction sets, the number of cores, and Python's version.

    Example:
        >>> describe_machine().endswith(f"Python {platform.python_version()}")
        True
    """
    name, flags = _processor()
    sets = [next((each for each in kind if each in flags), None) for kind in _KINDS]
    words = "+".join(each for each in sets if each) or "instruction sets unknown"
    python = platform.python_version()
    return f"{name} ({words}), {os.cpu_count()} cores, {platform.system()}, Python {python}"


def _processor() -> tuple[str, set[str]]:
    """Its name and flags, as Linux tells them; elsewhere the kind of processor alone."""
    file = pathlib.Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    pairs = [line.partition(":") for line in text.splitlines()]
    found = {key.strip().lower(): value.strip() for key, _, value in pairs}
    flags = found.get("flags") or found.get("features") or ""
    return found.get("model name") or platform.machine(), set(flags.split())


def peak_memory_mb() -> int | None:
    """Returns the megabytes of this process at its largest; None where nothing tells them."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`, which on Linux begins with the size of the process that started this one.
        lines = status.read_text().splitlines()
        found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(found[0]) // 1024 if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10
