"""Check that no claim changed since a git revision without a new entry in `revised`: check_claims.py REVISION."""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from pipeline.config.claims import load, unrevised

text = subprocess.run(["git", "show", f"{sys.argv[1]}:claims.yaml"], capture_output=True, check=True).stdout
with tempfile.TemporaryDirectory() as folder:
    (old := Path(folder, "claims.yaml")).write_bytes(text)
    changed = unrevised(load(old), load())
if changed:
    sys.exit(f"claims.yaml: changed since {sys.argv[1]} without an entry in revised: {', '.join(changed)}")
