"""The machine's own rate, which MFU is a share of."""

from collections.abc import Sequence

from benchmarks.measurement import Measurement, Record
from benchmarks.suites import Column, Setup, Suite, figure


def plan(setup: Setup) -> list[list[Measurement]]:
    """One process for all precisions."""
    return [[setup.ours("matmul", "products", setup.task, "all", worker="matmul")]]


def details(records: Sequence[Record]) -> list[str]:
    """Every product's rate, at its best over the rounds."""
    precisions = list(dict.fromkeys(record["contestant"] for record in records if "result" in record))
    best: dict[str, dict[str, float]] = {}
    for record in records:
        for shape, rate in record.get("result", {}).get("products", {}).items():
            row = best.setdefault(shape, {})
            row[record["contestant"]] = max(rate, row.get(record["contestant"], 0.0))
    lines = [
        "| rows × inputs × outputs | " + " | ".join(f"{p}, GFLOP/s" for p in precisions) + " |",
        "|---" * (1 + len(precisions)) + "|",
    ]
    for shape, rates in best.items():
        lines.append(f"| {shape} | " + " | ".join(f"{rates.get(p, 0.0) / 1e9:,.0f}" for p in precisions) + " |")
    sheets = [sheet for record in records if (sheet := record.get("result", {}).get("data_sheet"))]
    return [*lines, "", f"The maker's data sheet says {sheets[0] / 1e12:,.0f} TFLOP/s in bf16."] if sheets else lines


SUITE = Suite(
    "matmul", "The machine's matrix products",
    "The linear layers of the model's forward pass, each alone, at its shortest time; fp32 on a CPU by the fastest "
    "of torch's ways that does not round to fewer bits. A round's rate is that of its fastest product, and the median "
    "of the rounds is what MFU is a share of.",
    plan, (Column("GFLOP/s", figure("flops_per_second"), lambda rate: f"{rate / 1e9:,.0f}"),), details=details,
)  # fmt: skip
