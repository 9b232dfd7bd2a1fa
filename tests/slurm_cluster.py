"""A Slurm cluster on this machine for tests: munged, slurmctld and slurmds. All their files lie in one folder.

    with SlurmCluster(folder) as cluster:
        subprocess.run(["srun", "--nodes=2", "hostname"], env=cluster.env)

The nodes are named ``127.0.0.1``, ``127.0.0.2``, ... Slurm lists them as ``127.0.0.[1-2]``, in brackets like the nodes of a
large cluster, and every machine can reach them. Jobs in the partition ``urgent`` preempt jobs in the default partition.
"""

from __future__ import annotations

import getpass
import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin={task}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType={select}
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=15
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus}\n"
LAUNCHER_VARIABLES = ("SLURM_", "SRUN_", "SBATCH_", "MASTER_", "TORCHELASTIC_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class SlurmError(RuntimeError):
    """The cluster did not start. The message ends with the last log lines of its daemons."""


class SlurmCluster:
    """A Slurm cluster. Entering waits until its nodes are idle, and leaving stops jobs and daemons.

    Args:
        folder: Folder for configuration, key, socket, state and logs. Its path must be short, because the path of a socket may
            have at most 107 characters.
        nodes: Number of nodes.
        cpus: Number of CPUs per node. It may exceed the CPUs of this machine unless ``binds``.
        timeout: Seconds for all nodes to become idle.
        binds: Whether Slurm allocates single cores and binds processes to them.

    Attributes:
        env: Environment in which ``srun``, ``scancel`` and other commands use this cluster. It has no variables of a launcher.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2, timeout: float = 60, *, binds: bool = False) -> None:
        task, select = ("affinity", "cons_tres") if binds else ("none", "linear")
        self.plugins = {"task": f"task/{task}", "select": f"select/{select}"}
        self.folder, self.cpus, self.timeout = folder.resolve(), cpus, timeout
        self.nodes = [f"127.0.0.{1 + n}" for n in range(nodes)]
        self.env = _without_launcher(dict(os.environ)) | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        with ExitStack() as on_failure:
            on_failure.callback(self._stop)
            self._configure()
            self._start("munged", *self._munge_options())
            self._wait("munged", (self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
            self._wait("nodes", lambda: self.node_states() == ["idle"] * len(self.nodes))
            on_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._cancel_jobs()
        finally:
            self._stop()

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment and capture its output."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)

    def steps(self) -> list[str]:
        """Return the running job steps as ``job.step``."""
        return self.run("squeue", "--steps", "--noheader", "--format=%i").stdout.split()

    def fail_node(self, node: str) -> None:
        """Simulate a power failure: kill the daemon of a node and all processes on the node at once."""
        self._daemons[f"slurmd-{node}"].kill()
        self._daemons[f"slurmd-{node}"].wait()
        on_node, of_cluster = f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.env['SLURM_CONF']}"
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = [f"{key}={value}" for key, value in process.environ().items()]
                if on_node in environment and of_cluster in environment:
                    for ancestor in process.parents():
                        if ancestor.name().startswith("slurmstepd"):
                            ancestor.kill()
                    process.kill()

    def start_node(self, node: str) -> None:
        """Start a node again."""
        self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")

    def logs(self, lines: int = 15) -> str:
        """Return the last lines of every daemon's log."""
        tails = []
        for name in self._daemons:
            text = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
            tails.append("\n".join([f"--- {name}", *text[-lines:]]))
        return "\n".join(tails)

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        # Training derives its rendezvous port from the job number. A random first number keeps two clusters on this machine
        # apart, and numbers below 400 give ports below those that the kernel assigns to clients.
        first_job = random.randrange(1, 380)
        text = CONF.format(
            host=host, ports=ports, user=getpass.getuser(), folder=self.folder, first_job=first_job, **self.plugins
        )
        for name, port in zip(self.nodes, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=self.cpus)
        (self.folder / "slurm.conf").write_text(text)
        # The cluster uses no control groups. The v1 plugin does nothing without them. The plugin that Slurm would detect may
        # require root or systemd.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _munge_options(self) -> list[str]:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        # --force: munged rejects a folder that other users cannot read
        return ["--foreground", "--force", *(f"--{option}={self.folder / name}" for option, name in files.items())]

    def _start(self, program: str, *options: str, name: str | None = None) -> None:
        path = shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
        if path is None:
            raise SlurmError(f"{program} is not installed")
        name = name or program
        with open(self.folder / f"{name}.log", "wb") as log:
            # In a new session, Ctrl-C reaches only pytest, which then stops the daemons in order. With setpriv, the daemons
            # end if pytest is killed.
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", path, *options],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def node_states(self) -> list[str]:
        """Return the state of every node in Slurm's terms, or an empty list while Slurm does not answer."""
        with suppress(subprocess.TimeoutExpired):
            return self.run("sinfo", "--Node", "--noheader", "--partition=all", "--format=%T", timeout=10).stdout.split()
        return []

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.timeout
        while not ready():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} ended" if dead else f"not ready in {self.timeout:.0f} s: {self.node_states()}"
                raise SlurmError(f"{name}: {why}\n{self.logs()}")
            time.sleep(0.2)

    def _cancel_jobs(self) -> None:
        """End every job before the daemons stop. Slurm kills a job that ignores SIGTERM after KillWait."""
        with suppress(subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}", timeout=10)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", timeout=10).stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.2)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _without_launcher(env: dict[str, str]) -> dict[str, str]:
    return {name: v for name, v in env.items() if not name.startswith(LAUNCHER_VARIABLES) and name not in RANK_VARIABLES}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
