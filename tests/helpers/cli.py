"""Commands as a user gives them, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from sfd.cli.main import main


def sfd(*arguments: object) -> Result:
    """Run a command."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output, result.output
    return result


def done(*arguments: object) -> str:
    """Run a command that must succeed; return what it printed."""
    result = sfd(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, *words: str) -> None:
    """Check for exit code 2 and one line of error that has all the words."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if "error: " in line.lower()]
    assert len(lines) == 1 and all(word in lines[0] for word in words), result.output
