"""Programs that `benchmarks.serve` starts in processes of their own."""
