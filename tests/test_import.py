import json
import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_importing_kvtier_loads_nothing_else_of_it():
    code = """
import json, sys
import kvtier
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("kvtier", "numpy", "msgspec", "xxhash")]))
"""
    assert run(code) == ["kvtier"]


def test_a_name_loads_its_own_module_only():
    code = """
import json, sys
from kvtier import make_offload_key
print(json.dumps(sorted(name for name in sys.modules if name.startswith("kvtier"))))
"""
    assert run(code) == ["kvtier", "kvtier.errors", "kvtier.foreign_text", "kvtier.keys", "kvtier.redaction"]
