"""What `import reftlab` gives: every name, when it is first used."""

import importlib
import subprocess
import sys

import pytest

import reftlab as rl

FRESH = """
import sys
import reftlab as rl
assert "torch" not in sys.modules
print(rl.training.format_prompt is rl.format_prompt, rl.plotting.style.BLUE)
"""


def test_packages_are_there_without_being_imported_first():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "True"


@pytest.mark.parametrize("name", [name for name in rl.__all__ if name != "__version__"])
def test_every_name_is_where_it_is_said_to_be(name):
    home = importlib.import_module(rl._HOME_OF[name])
    assert getattr(rl, name) is getattr(home, name)
    assert name in home.__all__


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'interventoin'"):
        _ = rl.interventoin
