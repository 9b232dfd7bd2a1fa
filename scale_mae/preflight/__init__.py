"""Preflight: check all nodes of a job before it trains. :mod:`stages` lists the checks in order.

Files by question:
    ``command``, ``options``: the subcommand and its options.
    ``stages``: the order of the checks in each process.
    ``rendezvous``, ``typed_json``, ``timeout``: how processes exchange results, and how a process that hangs is found.
    ``gpu_health``, ``storage``, ``network_bandwidth``, ``device_timer``: measurements of one process.
    ``compare_nodes``, ``diagnosis``: which node is bad, and why.
    ``bad_nodes``, ``rank_0_state``: files in the run directory.
"""
