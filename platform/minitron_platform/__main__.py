"""`python -m minitron_platform`, the same as `minitron`."""

from minitron_platform.cli.commands import main

if __name__ == "__main__":
    main(prog_name="minitron")
