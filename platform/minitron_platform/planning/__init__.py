"""The plan of a run: its estimated cost, and the refusal of what cannot work before anything starts."""
