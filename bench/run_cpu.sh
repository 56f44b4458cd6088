#!/usr/bin/env bash
# The figures of the CPU engine that README and docs quote, measured on this machine: bench/results/cpu_*.json and cpu.svg.
# Usage: bench/run_cpu.sh [path of the tokenyard program]. Takes about ten minutes on two cores; leave the machine alone meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

program=${1:-build/cpu/apps/tokenyard/tokenyard}
results=bench/results
[[ -x $program ]] || { echo "error: $program is no program; build it with './dev bench --help', or name another" >&2; exit 2; }
mkdir -p "$results"

measure() {
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  "$program" bench "$@" --json "$results/$name.json"
}

# A virtual machine that has just given gigabytes back is slow for seconds, MPI three times as much as ever: small runs first, and pauses.
for ranks in 2 4; do
  sleep 15
  measure "cpu_${ranks}_ranks_16_tokens_latency" --ranks "$ranks" --tokens 16 --hidden-size 7168 --dtype bfloat16 --top-k 8 --experts 256 \
    --mode latency --layout rank_slots --iterations 2000 --warmup 200
done
for ranks in 2 4; do
  sleep 15
  measure "cpu_${ranks}_ranks_4096_tokens" --ranks "$ranks" --tokens 4096 --hidden-size 7168 --dtype bfloat16 --top-k 8 --experts 256
done
"$program" bench chart "$results"/cpu_{2,4}_ranks_{4096_tokens,16_tokens_latency}.json --svg "$results/cpu.svg"
