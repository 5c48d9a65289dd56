"""All suites by name, in the order of the report."""

from benchmarks.suites import checkpoint, gains, loader, lora, matmul, start, tokenizer, training

SUITES = {
    suite.name: suite
    for suite in (
        matmul.SUITE, training.SUITE, gains.SUITE, lora.SUITE, start.SUITE, loader.SUITE, tokenizer.SUITE,
        checkpoint.SUITE,
    )
}  # fmt: skip
