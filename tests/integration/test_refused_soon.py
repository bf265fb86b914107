"""What a user gets wrong is answered by the command line in one line, with exit code 2 and within a second."""

from __future__ import annotations

import resource

import pytest

from tests.unit.cli.test_cli import slimbench

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run method=gptq calibration_samples=0", "calibration_samples: "),
        ("run method=gptq method.gptq.bits=7", "method.gptq.bits: 7 is no valid choice"),
        ("run gptq", "did you mean 'method=gptq'?"),
        ("run --method gptq", "No such option: --method; did you mean method=gptq?"),
        ("sweep --method=gptq,awq", "did you mean method=gptq,awq?"),
        ("run method=gptq,awq", "are several values"),
        ("run stages=quality", "did you mean stages=[quality]?"),
        ("run suite.windows=4 suite.windows=8", "'suite.windows' is given twice: suite.windows=4 and suite.windows=8"),
        ("sweep method=gptq +method=awq", "'method' is given twice"),
        ("sweep method=rtn-4bit,gptq method.gptq.bits=3,4", "belongs to gptq only"),
        ("sweep --plan method=dense hydra/launcher=x", "give launcher=NAME"),
        ("run launcher=slrum", "no launcher 'slrum'; did you mean 'slurm'?"),
        ("run launcher=slurm launcher.time=4x", "launcher.time: '4x' is no duration; give it as 30s, 150m or 2h"),
        ("run --cfg job", "`slimbench config` shows each key"),
        ("sweep model=opt-125m,opt-125mm method=dense", "did you mean 'opt-125m'?"),
        ("rnu", "No such command 'rnu'. Did you mean 'run'?"),
    ],
)
def test_the_command_line_ends_with_2_in_one_line_and_soon(words: str, expected: str) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began = spent()
    done = slimbench(*words.split())
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ") and expected in done.stderr
    assert spent() - began < 1.0  # half a second on a core that runs nothing beside; processor time, as others may use the machine
