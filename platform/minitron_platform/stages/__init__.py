"""The stages of a run: each is a file with a class, and `order` lists them."""
