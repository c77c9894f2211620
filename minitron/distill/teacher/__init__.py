"""What the student learns from: a teacher that runs beside it, or its stored hidden states or most likely tokens."""
