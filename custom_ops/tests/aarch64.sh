#!/bin/sh
# Builds the test program of the kernels for aarch64 and runs it in qemu, on CPUs with SVE and without.
#   custom_ops/tests/aarch64.sh [FOLDER]
# FOLDER holds the build, build/aarch64 where it is not given.
# Debian and Ubuntu: apt-get install cmake make g++-aarch64-linux-gnu qemu-user
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$source/../build/aarch64}
compiler=aarch64-linux-gnu-g++
for tool in cmake "$compiler" qemu-aarch64; do
  command -v "$tool" > /dev/null || { echo "$tool is not installed; see the packages in $0" >&2; exit 2; }
done
cmake -S "$source" -B "$build" -DNMONNX_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_EXE_LINKER_FLAGS=-static
cmake --build "$build" --target kernels_test --parallel
for cpu in cortex-a53 max,sve=off max,sve128=on max,sve512=on; do
  echo "== $cpu"
  qemu-aarch64 -cpu "$cpu" "$build/kernels_test"
done
