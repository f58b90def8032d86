"""The examples run and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


def test_kernel_from_a_pair(capsys):
    main = runpy.run_path(str(EXAMPLES / "kernel_from_a_pair.py"))["main"]
    assert main() < 0.01
    assert "largest error" in capsys.readouterr().out
