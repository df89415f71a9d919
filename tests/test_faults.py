"""One try of the quick faults of `make faults`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_nothing_is_lost_by_the_quick_faults():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "faults", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = [line for line in ended.stdout.splitlines() if line.startswith(("LOST", "FAILED"))]
    assert ended.returncode == 0, failed or ended.stderr
