"""A Ray cluster of several nodes on this machine, for tests and bench/ray_study.py; it listens on loopback only."""

from ports import free_port

from telco_nb.engine.ray_engine import NO_USAGE_REPORT

ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"} | NO_USAGE_REPORT


class Cluster:
    """Nodes on this machine, each for one job without a GPU; the first one is the head, "a"."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster, self.nodes = Cluster(), {}

    def add(self, name: str, gpus: int = 0) -> None:
        ports = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
        chosen = {port: free_port() for port in ports}  # if Ray chooses them, it gives up after 15 s on a busy machine
        small = chosen | {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = self.cluster.add_node(node_name=name, num_gpus=gpus, resources={"processor": 1}, **small)
        self.nodes[name] = made

    def kill(self, name: str) -> None:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)
