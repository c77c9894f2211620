"""`python -m minitron_platform`, the same as `minitron`."""

from minitron_platform.cli import main

if __name__ == "__main__":
    try:
        main(prog_name="minitron")
    finally:
        # If Ctrl-C interrupts code that a string was compiled to, such as a dataclass's, Python ends a program of `python -m`
        # with a signal instead of its exit code. It forgets that when it runs such code again.
        exec("")
