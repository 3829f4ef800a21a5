"""Several Ray nodes on this machine in a process of their own, told what to do line by line.

`add CPUS GPUS` and `remove INDEX` on stdin; each is answered by one line on stdout, the first one is the address.
"""

from __future__ import annotations

import sys
from typing import Any

STORE = 80 * 2**20


def main() -> None:
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {"num_cpus": int(sys.argv[1]), "num_gpus": int(sys.argv[2]), "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    nodes: list[Any] = []
    print(cluster.address, flush=True)
    try:
        for line in sys.stdin:
            word, *rest = line.split()
            if word == "add":
                cpus, gpus = map(int, rest)
                nodes.append(cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE))
            elif word == "remove":
                cluster.remove_node(nodes[int(rest[0])], allow_graceful=False)
            print(f"done {word}", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
