#!/usr/bin/env bash
# environment.sh VERSION: makes the environment in which tests/sglang run with SGLang VERSION, unless it is there.
#
# SGLang's wheel asks for CUDA builds of dozens of packages. Its storage interface, its factory, its cache controller and
# its host pools need few of them on a CPU; `tests/sglang/stand_ins.py` says which imports are left out, and how.
set -euo pipefail
version=$1 python=${PYTHON:-python3}
venv=${XDG_CACHE_HOME:-$HOME/.cache}/kvtier/sglang-$version
pip() { "$venv/bin/pip" --disable-pip-version-check --quiet "$@"; }

[ -e "$venv/.complete" ] && exit
echo "making $venv: torch and transformers are large, this takes some minutes"
"$python" -m venv --clear "$venv"
pip install -c constraints.txt torch transformers
pip install "numpy>=1.26" "xxhash>=3.4" "msgspec>=0.18.6" "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100" psutil \
  aiohttp dill ipython orjson pillow pybase64 pydantic pyzmq requests starlette tqdm
pip install --no-deps "sglang==$version" apache-tvm-ffi "triton>=3.8"
touch "$venv/.complete"
