#!/usr/bin/env bash
# Installs the build into an empty prefix and uses it the two ways others will: find_package and pkg-config.
# Arguments: build folder, source folder, cmake, C++ compiler.
set -euo pipefail
build=$1 source=$2 cmake=$3 cxx=$4

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
prefix=$scratch/prefix
example=$source/examples/01_hello_exchange/main.cc

"$cmake" --install "$build" --prefix "$prefix" >/dev/null
libdir=$(dirname "$(find "$prefix" -name 'libtokenyard.*' -print -quit)")

echo "== find_package"
"$cmake" -S "$source/tests/install/consumer" -B "$scratch/consumer" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_PREFIX_PATH="$prefix" \
  -DEXAMPLE="$example"
"$cmake" --build "$scratch/consumer"
"$scratch/consumer/hello"

echo "== pkg-config"
read -ra flags <<<"$(PKG_CONFIG_PATH=$libdir/pkgconfig pkg-config --cflags --libs tokenyard)"
"$cxx" -std=c++20 "$example" -o "$scratch/hello" "${flags[@]}"
LD_LIBRARY_PATH=$libdir "$scratch/hello"

echo "== command line"
LD_LIBRARY_PATH=$libdir "$prefix/bin/tokenyard" --help
