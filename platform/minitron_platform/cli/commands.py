"""The command `minitron`: its subcommands, and how it ends on errors."""

from __future__ import annotations

import sys
import traceback
import warnings
from types import TracebackType
from typing import Any, NoReturn, TextIO

import click

from minitron import __version__
from minitron.errors import MinitronError, NotWritableError
from minitron.log_records import make_records_safe, safe
from minitron_platform.cli.cluster import cluster
from minitron_platform.cli.compare import compare
from minitron_platform.cli.dashboards import dashboards
from minitron_platform.cli.doctor import doctor
from minitron_platform.cli.evaluate import evaluate
from minitron_platform.cli.generate import chat, generate
from minitron_platform.cli.importance import importance
from minitron_platform.cli.jobs import jobs, logs, resume, status, stop
from minitron_platform.cli.models import models
from minitron_platform.cli.plan import plan
from minitron_platform.cli.program import command_line
from minitron_platform.cli.promote import promote, rollback
from minitron_platform.cli.prune import prune
from minitron_platform.cli.recipes import recipes
from minitron_platform.cli.report import report
from minitron_platform.cli.run import run
from minitron_platform.cli.submit import submit
from minitron_platform.cli.throughput import throughput
from minitron_platform.cli.tracking import sync, ui
from minitron_platform.console import echo, print_error
from minitron_platform.stopping import INTERRUPTED, TerminatedError, stopped_by_signals

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Prints a MinitronError as problem and fix and exits with code 2. Other exceptions are bugs and keep their traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with stopped_by_signals():
                return super().invoke(context)
        except NotWritableError as error:
            _fail(type(error)(error.problem, f"{error.remedy}{self._location_option(context)}"))
        except MinitronError as error:
            _fail(error)
        except KeyboardInterrupt:
            _stopped(INTERRUPTED)
        except TerminatedError as error:
            _stopped(error.code)

    def _location_option(self, context: click.Context) -> str:
        """End of the remedy for a folder that is not writable: names the option --storage if the command that failed has it."""
        command = self.get_command(context, context.invoked_subcommand or "")
        has_option = command is not None and any(parameter.name == "storage_path" for parameter in command.params)
        return " with --storage" if has_option else ""


def _fail(error: MinitronError) -> None:
    print_error(error)
    raise SystemExit(2)


def _stopped(exit_code: Any) -> NoReturn:
    echo(f"\nstopped; to resume: {command_line()}", err=True)
    raise SystemExit(exit_code)


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="minitron")
def main() -> None:
    """Turn one large language model into a family of smaller ones, by pruning and distillation.

    A recipe is a YAML file that describes the teacher, the text, the sizes of the students, the search and the evaluation.
    RECIPE is the path of such a file, or the name of a recipe that ships with Minitron (`minitron recipes` lists them).
    """
    make_records_safe()
    warnings.showwarning = _show_warning
    sys.excepthook = _show_exception


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(safe(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n")), err=True)


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    click.echo(safe("".join(traceback.format_exception(kind, error, trace)).rstrip("\n")), err=True)


main.add_command(recipes)
main.add_command(plan)
main.add_command(run)
main.add_command(submit)
main.add_command(jobs)
main.add_command(status)
main.add_command(logs)
main.add_command(stop)
main.add_command(resume)
main.add_command(cluster)
main.add_command(evaluate)
main.add_command(compare)
main.add_command(throughput)
main.add_command(generate)
main.add_command(chat)
main.add_command(report)
main.add_command(dashboards)
main.add_command(doctor)
main.add_command(sync)
main.add_command(promote)
main.add_command(rollback)
main.add_command(ui)
main.add_command(importance)
main.add_command(models)
main.add_command(prune)


if __name__ == "__main__":
    main()
