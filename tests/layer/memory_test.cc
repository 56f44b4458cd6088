// A step that is like the last one takes no memory for rows: what is allocated is bookkeeping.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "layer/harness.h"

namespace {
std::atomic<std::size_t> g_largest{0};  // allocation of any thread of this program

void note(std::size_t bytes) {
  std::size_t largest = g_largest.load(std::memory_order_relaxed);
  while (bytes > largest && !g_largest.compare_exchange_weak(largest, bytes)) {
  }
}
}  // namespace

// Not inlined: the compiler would see free() where it expects delete.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  note(bytes);
  if (void* const memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  note(bytes);
  return std::malloc(bytes == 0 ? 1 : bytes);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace tokenyard::testing {
namespace {

constexpr std::int64_t kTokens = 64;
constexpr std::int64_t kHidden = 512;
constexpr std::size_t kBookkeeping = 16 << 10;  // a matrix of this batch's rows has 128 KiB, or with bfloat16 64

std::size_t largest_of_a_later_step(const LayerCase& c) {
  std::size_t largest = 0;
  run_ranks(c.ep * c.tp, [&](World& world) {
    const Model model(c.sizes);
    ExpertGroupOptions options = group_options(c);
    options.max_tokens_per_rank = kTokens;
    const auto group = std::make_shared<ExpertGroup>(world, config_of(c), options);
    const RankWeights weights = weights_of(model, *group, c);
    MoeLayer layer(group, weights.views(), layer_options(c));
    const Tensor x(c.dtype, drawn("x " + std::to_string(world.rank()), kTokens * kHidden, 1), {kTokens, kHidden});
    const Tensor out = Tensor::zeros(c.dtype, {kTokens, kHidden});
    for (int step = 0; step < 3; ++step) {
      world.barrier();
      if (world.rank() == 0) g_largest = 0;
      world.barrier();
      layer.forward(x.view(), out.view(), {.mode = c.mode});
      world.barrier();
      if (world.rank() == 0) largest = g_largest;
    }
  });
  return largest;
}

TEST(Memory, ALaterStepAllocatesNoRows) {
  const ModelSizes sizes = {.flavour = Flavour::deepseek, .hidden = kHidden, .width = 64, .shared_width = 64};
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    for (LayerCase c : {LayerCase{.ep = 2, .tp = 2}, LayerCase{.ep = 2, .tp = 2, .mode = Mode::latency},
                        LayerCase{.ep = 2, .tp = 2, .expert_tp = ExpertTp::gathered, .dense_tp = 2},
                        LayerCase{.tp = 2, .same_tokens = true}, LayerCase{}}) {
      c.sizes = sizes;
      c.dtype = dtype;
      SCOPED_TRACE(c.describe());
      EXPECT_LT(largest_of_a_later_step(c), kBookkeeping);
    }
  }
}

TEST(Memory, NorDoesOneOfFloat8Experts) {
  const ModelSizes sizes = {.hidden = kHidden, .width = 128, .float8 = true};
  for (const LayerCase& c : {LayerCase{.sizes = sizes}, LayerCase{.sizes = sizes, .ep = 2}})
    EXPECT_LT(largest_of_a_later_step(c), kBookkeeping) << c.describe();
}

}  // namespace
}  // namespace tokenyard::testing
