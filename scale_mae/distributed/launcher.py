"""Read rank, world size and local rank from the environment variables of torchrun or Slurm (``srun`` alone).

This module does not import torch.
"""

from __future__ import annotations

import os
import subprocess

from scale_mae.config import UserError


def get_rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size) from the environment. This works before any process group exists."""
    rank, size, _ = get_ranks()
    return rank, size


def get_ranks() -> tuple[int, int, int]:
    """Return (rank, world size, local rank). Without a launcher this is (0, 1, 0).

    Under Slurm, this also sets ``MASTER_ADDR``, ``MASTER_PORT`` and ``LOCAL_WORLD_SIZE`` where they are not set.

    Raises:
        UserError: A rank variable is missing or is not a number.
    """
    env = os.environ
    try:
        if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
            return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
        if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID", "").isdigit():  # srun
            if int(env["SLURM_STEP_NUM_TASKS"]) == 1:
                return 0, 1, 0  # independent runs may share one job step, for example in an interactive shell
            env.setdefault("MASTER_ADDR", get_first_host(env["SLURM_STEP_NODELIST"]))
            port = get_rendezvous_port(env["SLURM_JOB_ID"], env["SLURM_STEP_ID"], env.get("SLURM_RESTART_COUNT", "0"))
            env.setdefault("MASTER_PORT", str(port))
            env.setdefault(
                "LOCAL_WORLD_SIZE", str(count_tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"])))
            )
            return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's rank variables are incomplete or wrong: {error}; use torchrun or srun") from None
    return 0, 1, 0


def get_rendezvous_port(job: str, step: str, restart: str) -> int:
    """Return the port of the rendezvous store of a Slurm job step.

    Every step and every restart gets another port, because another process may hold the previous one. The ports lie
    below the range from which the kernel assigns ports. A job has 31 of them, and a restart advances by 7.

    >>> [get_rendezvous_port("1", step, restart) for restart in ("0", "1", "5") for step in ("0", "1")]
    [20031, 20032, 20038, 20039, 20035, 20036]
    """
    return 20000 + int(job) * 31 % 12000 + (int(step) + 7 * int(restart)) % 31


def get_first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list."""
    return expand_host_list(nodes)[0]


def expand_host_list(nodes: str) -> list[str]:
    """Return the hosts of a Slurm node list such as ``gpu[03-05,9],cpu1``. A list without brackets needs no ``scontrol``.

    Raises:
        UserError: The list has brackets, and ``scontrol`` is missing or fails.
    """
    if "[" not in nodes:
        return nodes.split(",")
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"SLURM_STEP_NODELIST={nodes} cannot be expanded without scontrol; set MASTER_ADDR") from None
    return listed.stdout.split()


def count_tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Return the number of tasks of one node, from Slurm's run-length form such as ``4(x2),3``."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def get_node_rank() -> int:
    """Return the number of this node in the job, from torchrun or Slurm. Without a launcher this is 0."""
    for name in ("GROUP_RANK", "SLURM_NODEID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0
