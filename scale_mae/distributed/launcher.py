"""Who am I among how many: rank numbers as torchrun or Slurm (``srun`` alone) give them. Imports no torch."""

from __future__ import annotations

import os
import subprocess

from scale_mae.config import UserError


def get_rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes), from the environment, before any process group exists."""
    rank, size, _ = get_ranks()
    return rank, size


def get_ranks() -> tuple[int, int, int]:
    """(rank, size, local rank); under Slurm also sets the meeting point of the processes."""
    env = os.environ
    try:
        if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
            return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
        if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID", "").isdigit():  # srun
            if int(env["SLURM_STEP_NUM_TASKS"]) == 1:
                return 0, 1, 0  # several single runs may share one job step, an interactive shell for instance
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            port = rendezvous_port(env["SLURM_JOB_ID"], env["SLURM_STEP_ID"], env.get("SLURM_RESTART_COUNT", "0"))
            env.setdefault("MASTER_PORT", str(port))
            env.setdefault("LOCAL_WORLD_SIZE", str(tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"]))))
            return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's rank variables are incomplete or wrong: {error}; use torchrun or srun") from None
    return 0, 1, 0


def rendezvous_port(job: str, step: str, restart: str) -> int:
    """Where the processes of a job step meet: others for other steps and restarts, since one may be taken by a stranger.

    It is below the range from which the kernel hands out ports. Each job has 31, of which a restart goes on 7 further.

    >>> [meeting_port("1", step, restart) for restart in ("0", "1", "5") for step in ("0", "1")]
    [20031, 20032, 20038, 20039, 20035, 20036]
    """
    return 20000 + int(job) * 31 % 12000 + (int(step) + 7 * int(restart)) % 31


def first_host(nodes: str) -> str:
    """First host of a Slurm node list; that of a list without brackets needs no program."""
    return expand_host_list(nodes)[0]


def expand_host_list(nodes: str) -> list[str]:
    """Hosts of a Slurm node list such as ``gpu[03-05,9],cpu1``.

    Raises:
        UserError: brackets, and no scontrol to expand them.
    """
    if "[" not in nodes:
        return nodes.split(",")
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"cannot expand SLURM_STEP_NODELIST={nodes} without scontrol; set MASTER_ADDR yourself") from None
    return listed.stdout.split()


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks of one node from Slurm's run-length form ``4(x2),3``."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def get_node_rank() -> int:
    """Number of this machine among those of the job, from torchrun or Slurm; 0 without them."""
    for name in ("GROUP_RANK", "SLURM_NODEID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0
