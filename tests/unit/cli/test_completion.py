"""What the shell is offered while an override is typed."""

from __future__ import annotations

import os
import subprocess
import sys

from slimbench.harness.cli.terminal import complete


def test_groups_then_their_choices_then_the_next_of_a_list() -> None:
    assert "method=" in complete("") and complete("meth") == ["method="]
    assert {"method=gptq", "method=gptq-3bit"} <= set(complete("method=gpt"))
    assert "method=gptq,rtn-4bit" in complete("method=gptq,rtn-4") and complete("method=gtpq") == []


def test_the_shell_is_answered() -> None:
    environment = os.environ | {"_SLIMBENCH_COMPLETE": "complete_bash", "COMP_WORDS": "slimbench run method=gpta", "COMP_CWORD": "2"}
    command = [sys.executable, "-P", "-c", "import sys; sys.argv[0] = 'slimbench'; from slimbench.harness.cli.main import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "method=gptaq" in done.stdout.split()
