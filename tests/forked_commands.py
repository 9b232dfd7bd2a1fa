"""Programs named ``scale-mae``, ``torchrun``, ``srun`` and ``python`` that start at once, for tests that run many commands.

Importing PyTorch and DeepSpeed takes seconds per process. Here one server imports them once and forks for each command.
A command has its own working directory, environment, standard streams and exit code.

    with CommandServer(folder) as server:
        subprocess.run(["bash", "-c", "scale-mae status runs > status.txt"], env=os.environ | server.environment)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENT = """\
#!{python} -IS
import json, os, socket, sys

connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
program, *words = sys.argv
request = {{"program": os.path.basename(program), "words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(connection.recv(16) or b"1"))
"""
HEAVY = (  # what commands import, some of it late
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx", "torch.testing", "timm"),
    *("matplotlib.pyplot", "plotly.graph_objects", "plotly.io", "transformers", "scale_mae.training.trainer"),
    *("scale_mae.api", "scale_mae.evaluation.evaluate", "scale_mae.evaluation.knn", "scale_mae.weights.convert"),
)
PROGRAMS = ("scale-mae", "torchrun", "srun", "python")


class CommandServer:
    """Serves the programs while the context is open.

    Args:
        folder: where the programs and the socket go; the path must be short.

    Attributes:
        environment: variables with which a shell finds the programs.
    """

    def __init__(self, folder: Path) -> None:
        self._address, programs = str(folder / "socket"), folder / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            (programs / name).write_text(CLIENT.format(python=sys.executable, address=self._address))
            (programs / name).chmod(0o755)
        (programs / "squeue").write_text("#!/bin/sh\nexit 1\n")  # a real one without a cluster waits for a minute
        (programs / "squeue").chmod(0o755)
        self.environment = {"PATH": f"{programs}:{os.environ['PATH']}"}

    def __enter__(self) -> CommandServer:
        command = [sys.executable, __file__, self._address]
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT)
        deadline = time.monotonic() + 120
        while not os.path.exists(self._address):
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start within 120 s"
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def serve(address: str) -> None:
    """Import what commands need, then fork for each request."""
    for module in HEAVY:
        importlib.import_module(module)
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            torch.set_num_threads(1)
            run(connection)
        connection.close()


def run(connection: socket.socket) -> None:
    """Run the request of a connection in this process, send the exit code, and end."""
    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    request = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    code = 1
    with contextlib.suppress(BaseException):
        code = execute(request["program"], request["words"])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    connection.sendall(str(code).encode())
    os._exit(0)


def execute(program: str, words: list[str]) -> int:
    """Run a program; its exit code."""
    import traceback

    try:
        if program == "python":
            exec(compile(words[-1], "<documentation>", "exec"), {"__name__": "__main__"})
            return 0
        if program == "torchrun":
            return run_processes(words)
        if program == "srun":
            words = words[words.index("scale-mae") + 1 :]
        from scale_mae.cli import main

        sys.argv = ["scale-mae", *words]
        return main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def run_processes(words: list[str]) -> int:
    """Run the ranks of ``torchrun --nproc-per-node N -m scale_mae ...``; 0 if all of them succeed."""
    count = int(words[words.index("--nproc-per-node") + 1])
    words = words[words.index("scale_mae") + 1 :]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(["scale-mae", *words], env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    return max(rank.wait() for rank in ranks)


if __name__ == "__main__":
    serve(sys.argv[1])
