"""What a recipe will do and cost, and what of it cannot work, before anything starts."""
