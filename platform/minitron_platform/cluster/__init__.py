"""Ray: a private one or a cluster, what must fit on it, and jobs that are sent to it."""
