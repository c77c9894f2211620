"""What a teacher and a process take, from shapes and settings alone."""
