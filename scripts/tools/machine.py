"""The cores of this machine, and what processes use of it."""

import contextlib
import os
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use; a container's quota counts."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def _numbers(file: str) -> dict[str, int]:
    """Lines `name: number ...` of a file in /proc; none where it does not exist."""
    with contextlib.suppress(OSError):
        lines = (line.replace(":", " ").split() for line in Path(file).read_text().splitlines())
        return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
    return {}


def usage(pid: int) -> tuple[int, float]:
    """Peak of a process's memory in bytes and the seconds that it has computed; zeros where /proc does not say them."""
    with contextlib.suppress(OSError, IndexError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
        return 1024 * _numbers(f"/proc/{pid}/status").get("VmHWM", 0), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return 0, 0.0


def session_bytes(leader: int) -> int:
    """Memory of the processes that a leader of a session started; what they share with others counts in part."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if stat.parent.name != f"{leader}" and stat.read_text().rpartition(") ")[2].split()[3] == f"{leader}":
                total += 1024 * _numbers(f"{stat.parent}/smaps_rollup").get("Pss", 0)
    return total
