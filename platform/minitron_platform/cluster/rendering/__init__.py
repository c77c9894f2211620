"""The files that start a cluster, from the templates in `clusters/` and the user's figures."""
