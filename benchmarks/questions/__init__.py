"""One module per command of `scripts/bench`: its options, its measurement and its report."""
