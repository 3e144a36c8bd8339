from __future__ import annotations

import subprocess
import sys

# Ctrl-C comes in the very moment in which the command line begins to be imported.
INTERRUPTED = """
import signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "gpumesh.cli.root_command":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from gpumesh.cli.main import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_nothing_is_imported_before_main_is_called() -> None:
    script = "import sys; import gpumesh.cli.main; print(sorted({'typer', 'gpumesh.errors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_few_garbage_collections_look_through_the_modules_that_are_imported() -> None:
    script = """
import gc, sys
import gpumesh.cli.main
before = sum(generation["collections"] for generation in gc.get_stats())
sys.argv = ["gpumesh", "--help"]
try:
    gpumesh.cli.main.main()
except SystemExit:
    print(sum(generation["collections"] for generation in gc.get_stats()) - before, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stderr) <= 3, "with the thresholds of Python it is 25"
