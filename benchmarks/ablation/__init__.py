"""An ablation of the method's choices on one model: equal parameters, equal tokens, one choice changed at a time."""
