#include <tokenyard/tokenyard.h>

#include <cmath>
#include <iostream>
#include <vector>

using namespace tokenyard;

int main() {
  run_ranks(4, [](World& world) {  // four ranks as threads; World::connect and launch() make them processes
    const Placement placement = Placement::uniform(/*num_experts=*/8, world.size());
    Exchange exchange(world, {.max_tokens_per_rank = 16, .max_row_bytes = 64 * 4, .top_k = 2, .max_local_experts = 2});
    exchange.add(placement);

    std::vector<float> rows(16 * 64, 1.0F), logits(16 * 8);
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>((i * 37 + world.rank()) % 11);
    const Routing routing = route({.logits = {logits.data(), Dtype::float32, {16, 8}}}, Gate::softmax(2, /*renormalise=*/true));

    Received received = exchange.dispatch(
        {.rows = {rows.data(), Dtype::float32, {16, 64}}, .topk_ids = routing.ids_view(), .topk_weights = routing.weights_view()},
        {.layout = Layout::expert_major});
    // received.rows() is grouped by local expert: here they would compute. These return what they got, so every sum is a row.
    const Combined sums = exchange.combine(received.rows(), received.handle(), {.weighting = Weighting::at_expert});
    if (std::abs(sums.out.as<float>()[0] - 1.0F) > 1e-6F) throw Error("combine did not return the rows");
    if (world.rank() == 0) std::cout << "rank 0 computed " << received.num_rows() << " rows for all four\n";
  });
}
