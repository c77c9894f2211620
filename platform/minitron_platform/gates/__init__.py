"""The gates that a version of a model passes before an alias is pointed at it."""
