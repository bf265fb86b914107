"""Where the tests find what lies in the repository, and the command that they start slimbench by."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "tests" / "support" / "records"
FOREIGN = ROOT / "tests" / "support" / "foreign"
SMALL_CACHES = ROOT / "tests" / "support" / "small_caches"
SLIMBENCH = (sys.executable, "-P", "-m", "slimbench")
