"""The roads are found, and end where they should: their lengths are the design's, not the test's."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "roads.py"


def test_all_roads_are_met_from_their_first_call_to_their_last():
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    files = {road["name"]: road["files"] for road in printed["roads"]}
    assert list(files) == ["create_spec", "store", "result", "promotion"]
    assert "tiering/manager.py" in files["store"]
    assert "primary/table.py" in files["result"]
    assert any(name.startswith("stores/slab/") for name in files["promotion"]), "what the I/O process calls is missing"
    assert printed["structure"]["fields of RequestState"] > 0
