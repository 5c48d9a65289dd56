"""The rates that the step time of a cluster is made of: one set for all models, devices and programs.

Some are published, with their source; the others are named as fitted.  ``python -m benchmarks.plan_cluster`` fits those
and shows them beside published runs.
"""

from dataclasses import dataclass

# The largest share of the dense peak that matrix products of 16 bits reach, by the kind of device: the table "Maximum
# Achievable Matmul FLOPS" of github.com/stas00/ml-engineering (compute/accelerator), 2026.
MATMUL_SHARE = {
    "a100": 0.869, "a100pcie": 0.811, "h100": 0.803, "h200": 0.803, "b200": 0.776, "b300": 0.786, "mi300x": 0.514,
}  # fmt: skip
OTHER_MATMUL_SHARE = 0.80
# The share of the dense peak that the attention of FlashAttention-2, which torch uses, reaches: 35% on an H100 (Shah et
# al. 2024, FlashAttention-3, abstract); 50 to 73% on an A100 (Dao 2023, abstract).  For Blackwell as for Hopper.
ATTENTION_SHARE = {
    "h100": 0.35, "h100pcie": 0.35, "h100nvl": 0.35, "h200": 0.35, "h200nvl": 0.35, "h20": 0.35, "b200": 0.35,
    "b300": 0.35,
}  # fmt: skip
OTHER_ATTENTION_SHARE = 0.60
ATTENTION_BACKWARD = 2.5  # operations of attention's backward pass, which computes the scores again (Dao 2023)


@dataclass(frozen=True)
class Rates:
    """The fitted rates."""

    product_size: float = 100.0  # a dimension of n of a product reaches n / (n + this) of the largest share
    bandwidth_share: float = 0.80  # of the memory's rate, by operations that only read and write; set, not fitted
    eager_traffic: float = 2.8  # bytes read and written between the products without compiled blocks, relative to with
    power_exponent: float = 0.85  # the rate of products goes with (power limit / full power) to this
    contention: float = 0.60  # of communication beside computation is lost to it: units and memory that both use
    jitter: float = 0.015  # a step is this much longer with each doubling of the hosts: the slowest rank decides


RATES = Rates()


def kind_of(device: str) -> str:
    """The kind of a device by its name in the table: h100 of h100-80gb."""
    return device.partition("-")[0]


def matmul_share(device: str) -> float:
    """The largest share of the peak that matrix products reach on a device of the table."""
    return MATMUL_SHARE.get(kind_of(device), OTHER_MATMUL_SHARE)


def attention_share(device: str) -> float:
    """The share of the peak that attention reaches on a device of the table."""
    return ATTENTION_SHARE.get(kind_of(device), OTHER_ATTENTION_SHARE)
