"""The whole chain on a simulated CUDA device, in its own process: torch cannot forget the device.

``make soak`` tries more networks, caches and ways to train.
"""

from __future__ import annotations

from pathlib import Path

from command_server import CommandServer
from helpers import ROOT, environment

CODE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def test_the_chain_runs_on_a_device_that_is_not_the_cpu(
    commands: CommandServer, shared: Path, dataset: Path, small_dataset: Path, empty_store: Path
) -> None:
    """The process takes data sets and store from the shared folder."""
    file = ROOT / "tests" / "on_simulated_cuda.py"
    words = ["-p", "no:cacheprovider", "-W", "ignore", "-rA", file]
    variables = environment() | {"PNEUMO_SHARED": str(shared)}
    code, output = commands.start(*words, folder=ROOT, environment=variables, code=CODE).communicate()
    print(output[-5000:])
    assert code == 0, output[-10000:]
    passed = [line for line in output.splitlines() if line.startswith("PASSED")]
    assert len(passed) >= 11
