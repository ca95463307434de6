"""The whole chain on a simulated CUDA device, in its own process: torch cannot forget the device.

``make soak`` tries one more network.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_chain_runs_on_a_device_that_is_not_the_cpu() -> None:
    file = Path(__file__).with_name("on_simulated_cuda.py")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-rA", str(file)]
    done = subprocess.run(words, cwd=file.parents[1], capture_output=True, text=True)
    print(done.stdout[-5000:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert len(passed) >= 19
