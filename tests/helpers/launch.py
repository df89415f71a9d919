"""Starting the command, or a script, as two ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def environment(**more):
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launcher, *map(str, arguments)], env=environment(), capture_output=True, text=True)


def pair(*arguments):
    """Start the command as two ranks by the environment alone, as a queue's own launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "sfd", *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
