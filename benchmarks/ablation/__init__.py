"""Which of the method's choices matter, on one model: equal parameters, equal tokens, one choice changed at a time."""
