"""The diagnosis of a preflight: the findings so far, and the nodes that are bad."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from scale_mae.doctor import Finding, print_findings
from scale_mae.preflight.options import PreflightOptions


@dataclass
class Diagnosis:
    """The findings of a preflight. Only rank 0 has a complete one.

    Attributes:
        node_of_rank: Name of the node of each rank.
        findings: The findings, in the order of the checks.
        bad_nodes: Names of the nodes to exclude.
        measurements: Measured values of each node, by name. The names of the values carry units.
    """

    node_of_rank: list[str]
    findings: list[Finding] = field(default_factory=list)
    bad_nodes: list[str] = field(default_factory=list)
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The name of every node once, in the order of their first ranks."""
        return list(dict.fromkeys(self.node_of_rank))

    @property
    def passed(self) -> bool:
        """Whether no finding is a problem, so that training may start."""
        return not any(finding.level == "problem" for finding in self.findings)

    def add_finding(self, level: str, what: str, advice: str = "") -> None:
        """Add a finding that concerns no single node.

        Args:
            level: ``ok``, ``note`` or ``problem``.
            what: What was found.
            advice: What to do about it.
        """
        self.findings.append(Finding(level, what, advice))

    def add_bad_nodes(self, problems: Mapping[str, str], advice: str, advice_if_all: str = "") -> None:
        """Add a problem of each node, and mark the nodes as bad.

        Args:
            problems: The problem of each bad node, by name.
            advice: What to do about one node.
            advice_if_all: What to do if every node has such a problem. The cause then lies outside the nodes, so none is marked
                as bad. If this is empty, nodes are always marked.
        """
        if advice_if_all and problems.keys() >= set(self.nodes):
            node, problem = next(iter(problems.items()))
            everywhere = f"every node has this problem, for instance node {node}: {problem}"
            self.add_finding("problem", problem if len(self.nodes) == 1 else everywhere, advice_if_all)
            return
        for node, problem in problems.items():
            self.add_finding("problem", f"node {node}: {problem}", advice)
            if node not in self.bad_nodes:
                self.bad_nodes.append(node)

    def add_bad_ranks(self, problems: Mapping[int, str], advice: str, advice_if_all: str = "") -> None:
        """Add the problems of ranks as problems of their nodes; see :meth:`add_bad_nodes`."""
        self.add_bad_nodes(self.get_problem_by_node(problems), advice, advice_if_all)

    def get_problem_by_node(self, problems: Mapping[int, str]) -> dict[str, str]:
        """Return the first problem of each node. If several ranks run on the node, the text names the rank."""
        by_node: dict[str, str] = {}
        for rank, problem in problems.items():
            node = self.node_of_rank[rank]
            by_node.setdefault(node, f"rank {rank}: {problem}" if self.node_of_rank.count(node) > 1 else problem)
        return by_node

    def record(self, node: str, name: str, value: float) -> None:
        """Record a measured value of a node. Of several values, the lowest is kept."""
        values = self.measurements.setdefault(node, {})
        values[name] = round(min(value, values.get(name, value)), 3)


def print_diagnosis(diagnosis: Diagnosis, options: PreflightOptions, seconds: float) -> None:
    """Print the findings and the bad nodes.

    Args:
        diagnosis: The diagnosis.
        options: Whether to print JSON, and the file that lists the bad nodes.
        seconds: Duration of the preflight.
    """
    if options.as_json:
        summary = {"passed": diagnosis.passed, "bad_nodes": diagnosis.bad_nodes, "seconds": round(seconds, 1)}
        findings = [finding._asdict() for finding in diagnosis.findings]
        print(json.dumps(summary | {"findings": findings, "nodes": diagnosis.measurements}, indent=2))
    else:
        print_findings(diagnosis.findings)
        if diagnosis.bad_nodes:
            print(f"bad nodes, listed in {options.bad_nodes}: {' '.join(diagnosis.bad_nodes)}")
    sys.stdout.flush()
