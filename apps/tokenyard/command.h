#pragma once
// The subcommands. Each adds itself to the program; its work runs in CLI11's callback and reports failure by exception.

namespace CLI {
class App;
}

namespace tokenyard::cli {

void add_demo(CLI::App& program);
void add_bench(CLI::App& program);
void add_bench_sweep(CLI::App& bench);
void add_bench_compare(CLI::App& bench);
void add_bench_chart(CLI::App& bench);
void add_bench_collective(CLI::App& bench);
void add_bench_layer(CLI::App& bench);
void add_bench_experts(CLI::App& bench);
void add_verify(CLI::App& program);
void add_topo(CLI::App& program);
void add_parallel(CLI::App& program);
void add_plan_memory(CLI::App& program);
void add_launch(CLI::App& program);

}  // namespace tokenyard::cli
