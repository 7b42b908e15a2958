"""The command `cab-hf`, as tests run it."""

import pytest

from cab_hf.cli import main


def error_of(capsys, *arguments: object) -> str:
    """Runs a command that must fail, and returns its only line of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]
