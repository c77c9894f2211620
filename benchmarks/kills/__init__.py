"""A run on a cluster of this machine whose processes are killed at chosen moments; see `benchmarks.kill_matrix`."""
