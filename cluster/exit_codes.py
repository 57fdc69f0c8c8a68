"""How a command ends: with a message, and code 2 where it was refused, 1 where it failed, 130 on Ctrl-C."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def messages(debug: bool) -> Iterator[None]:
    """Turn what ends a command early into a message and an exit code; with `debug` the traceback is shown."""
    from trainer.errors import RunFailed, UserError
    from trainer.recipe.redaction import hidden

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            click.echo(hidden(traceback.format_exc()), err=True)
            if isinstance(error, RunFailed) and error.trace:
                told = f"\nwhere it came from, perhaps another process:\n{error.trace}"
                click.echo(hidden(told), err=True)
        if isinstance(error, KeyboardInterrupt):
            said, code = f"\n{str(error) or 'interrupted'}", getattr(error, "exit_code", 130)
        elif isinstance(error, UserError):
            said, code = str(error), 2
        elif isinstance(error, RunFailed):
            said, code = f"failed: {error}", 1
        elif isinstance(error, click.ClickException | click.exceptions.Exit):
            raise
        else:
            said, code = f"failed: {type(error).__name__}: {error}\n--debug shows where", 1
        click.echo(hidden(said), err=True)
        sys.exit(code)
