"""Where, when and by which commit something was measured."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch


def made_by(device: torch.device, processes: int = 1) -> dict[str, Any]:
    return {
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


RESULTS = (":(top,exclude)benchmarks/results", ":(top,exclude)train/results")


def commit() -> str | None:
    """Of the project, if this is a checkout of it; it ends in -dirty where files, but for results, differ from it."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository that it lies in is another one
        name = _git("describe", "--always", "--exclude=*")
        return name + "-dirty" * bool(_git("diff", "--name-only", "HEAD", "--", ":/", *RESULTS))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
