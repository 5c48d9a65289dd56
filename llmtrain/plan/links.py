"""The links between the GPUs of a cluster, and the time and volume of collective operations over them."""

from dataclasses import dataclass
from enum import Enum

from llmtrain.plan.mesh import Group

# Bytes a second that a GPU sends to the others of its host, one way: half of what NVIDIA's data sheets name for both
# ways of V100 (NVLink 2, 300 GB/s), A100 (NVLink 3, 600), H100, H200 and H20 (NVLink 4, 900), B200 and B300 (NVLink 5,
# 1,800), and AMD's for MI300X (seven links of 128).
NVLINK = {
    "v100": 150e9, "a100": 300e9, "h100": 450e9, "h200": 450e9, "h20": 450e9, "b200": 900e9, "b300": 900e9,
    "mi300x": 448e9,
}  # fmt: skip
PCIE = {"h100pcie": 64e9, "h200nvl": 450e9, "h100nvl": 300e9}  # PCIe 5, or NVLink bridges; else PCIe 4
PCIE_4 = 32e9

# The share of a link's rate that collectives reach.  NCCL takes 360 of 450 GB/s for NVLink on Hopper and 720 of 900 on
# Blackwell (its tuning model, github.com/NVIDIA/nccl).
HOST_SHARE = 0.8
# Seconds for each step of a ring: 3.4 µs over NVLink, 14 µs over a network (hwLatencies, ring and Simple protocol, of
# src/graph/tuning.cc in github.com/NVIDIA/nccl).
HOST_LATENCY = 3.4e-6
NETWORK_LATENCY = 14e-6
# Boards with four GPUs have no NVSwitch: a GPU's links are divided among the three others (NVIDIA HGX A100, H100 and
# H200 4-GPU).
SWITCHED_GPUS = 8
# Of a network adapter's rate; a usual result of nccl-tests.
NETWORK_SHARE = 0.9


class Network(Enum):
    """Networks between hosts, by the rate of one GPU's adapter; see :data:`GIGABITS`."""

    infiniband = "infiniband"
    roce = "roce"
    ethernet = "ethernet"


# Gbit/s a GPU.  InfiniBand NDR, one adapter a GPU, as in a DGX H100; 200 Gbit/s RoCE as in clouds with A100; 100 Gbit/s
# Ethernet for a host of eight.
GIGABITS = {Network.infiniband: 400.0, Network.roce: 200.0, Network.ethernet: 12.5}


@dataclass(frozen=True)
class Links:
    """The links of a cluster of equal hosts; rates one way, in bytes a second of each GPU."""

    gpus_per_host: int
    host: float
    network: float

    def span(self, group: Group) -> tuple[int, int]:
        """Return how many ranks of a group are on one host, and on how many hosts the group is."""
        local = max(1, min(group.size, self.gpus_per_host // group.stride))
        return local, -(-group.size // local)

    def host_rate(self, local: int) -> float:
        """Return the rate at which a GPU exchanges with the others of ``local`` ranks on its host."""
        is_direct = 1 < local <= self.gpus_per_host < SWITCHED_GPUS
        return self.host * HOST_SHARE * ((local - 1) / (self.gpus_per_host - 1) if is_direct else 1.0)

    def scatter_seconds(self, num_bytes: float, group: Group) -> float:
        """The time of an all-gather or a reduce-scatter of ``num_bytes`` in all, parts of all ranks together.

        Each host receives the parts of the others once, through the adapters of all its ranks of the group, and passes
        them on within itself at the same time.
        """
        if group.size == 1:
            return 0.0
        local, hosts = self.span(group)
        within = scattered_bytes(num_bytes, group.size) / self.host_rate(local) if local > 1 else 0.0
        between = scattered_bytes(num_bytes, hosts) / (local * self.network * NETWORK_SHARE)
        latency = (group.size - hosts) * HOST_LATENCY + (hosts - 1) * NETWORK_LATENCY
        return max(within, between) + latency

    def reduce_seconds(self, num_bytes: float, group: Group) -> float:
        """The time of an all-reduce of ``num_bytes``: a reduce-scatter and an all-gather."""
        return 2 * self.scatter_seconds(num_bytes, group)

    def send_seconds(self, num_bytes: float, group: Group) -> float:
        """The time to send ``num_bytes`` from one rank of a group to the next one."""
        if group.size == 1:
            return 0.0
        local, _ = self.span(group)
        if local > 1:
            return num_bytes / self.host_rate(2) + HOST_LATENCY
        return num_bytes / (self.network * NETWORK_SHARE) + NETWORK_LATENCY


def scattered_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes that each of ``ranks`` receives in an all-gather of ``num_bytes`` in all, or sends in a reduce-scatter."""
    return num_bytes * (ranks - 1) / ranks


def links_of(
    device: str, gpus_per_host: int, network: Network, host_gigabytes: float | None, network_gigabits: float | None
) -> Links:
    """Build the links of a cluster of ``device``, a name of the table; None: the usual rate."""
    kind = device.partition("-")[0]
    host = 1e9 * host_gigabytes if host_gigabytes is not None else NVLINK.get(kind, PCIE.get(kind, PCIE_4))
    gigabits = network_gigabits if network_gigabits is not None else GIGABITS[network]
    return Links(gpus_per_host, host, 1e9 * gigabits / 8)
