"""`minitron doctor`: checks of this machine or of a cluster, each with what to do about a failure."""
