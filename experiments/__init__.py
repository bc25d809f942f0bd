"""What a person runs: training, comparisons, benchmarks, and the modules they share."""
