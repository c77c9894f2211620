"""How stages use the workers of a run: processes of Ray, on the nodes of the cluster or on this machine."""
