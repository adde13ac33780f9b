#!/bin/sh
# Runs the op tests with several releases of ONNX Runtime, each in a virtual environment of its own.
#   custom_ops/tests/try_ort_versions.sh FOLDER [VERSION...]
# FOLDER holds the environments, which are kept. PYTHON names the interpreter (1.17 needs 3.11 or older).
set -eu
folder=${1:?give a folder for the virtual environments}
shift
[ $# -gt 0 ] || set -- 1.17.0 1.20.0 1.24.1 1.32.0
repository=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
failed=""
for version in "$@"; do
  venv=$folder/ort-$version
  if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    numpy="numpy"
    case $version in 1.17.*|1.18.*) numpy="numpy<2" ;; esac
    "$venv/bin/pip" install -q "onnxruntime==$version" "$numpy" "onnx>=1.17" pytest hypothesis
  fi
  echo "== onnxruntime $version"
  (cd "$repository" && PYTHONPATH=$repository "$venv/bin/python" -m pytest -q -p no:cacheprovider --noconftest \
    tests/test_ops_prune.py tests/test_ops_matmul.py tests/test_ops_library.py \
    tests/test_ops_nbits.py tests/test_ops_nbits_contract.py \
    --deselect tests/test_ops_library.py::test_the_kernels_stay_inside_their_buffers_under_sanitizers) \
    || failed="$failed $version"
done
[ -z "$failed" ] || { echo "failed with:$failed"; exit 1; }
