"""Ray: a private session or a cluster, the resources that a run needs of it, and jobs submitted to it."""
