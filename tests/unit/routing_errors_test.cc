// Arguments that do not fit are refused with their values, the expectation and a remedy.

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "tokenyard/routing.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

const std::vector<float> kNumbers(8192, 1.0F);

ConstTensorView floats(std::initializer_list<std::int64_t> shape) { return {kNumbers.data(), Dtype::float32, shape}; }

void refused(const RoutingInput& input, const Gate& gate, std::initializer_list<std::string_view> parts) {
  expect_usage_error([&] { route(input, gate); }, parts);
}

TEST(RoutingErrors, TopK) {
  refused({.logits = floats({2, 7})}, Gate::softmax(9, true), {"top_k = 9 exceeds num_experts = 7", "choose top_k <= 7"});
  refused({.logits = floats({2, 7})}, Gate::softmax(0, true), {"top_k = 0", "1..64"});
  refused({.logits = floats({2, 100})}, Gate::softmax(65, true), {"top_k = 65", "1..64"});
}

TEST(RoutingErrors, Logits) {
  refused({}, Gate::softmax(1, true), {"logits are", "[tokens, experts]"});
  refused({.logits = floats({8})}, Gate::softmax(1, true), {"[8] float32", "[tokens, experts]"});
  refused({.logits = {kNumbers.data(), Dtype::int32, {2, 4}}}, Gate::softmax(1, true), {"[2, 4] int32", "float32, bfloat16 or float16"});
  refused({.logits = floats({1, 4097})}, Gate::softmax(1, true), {"num_experts = 4097", "1..4096"});
  refused({.logits = floats({3, 0})}, Gate::softmax(1, true), {"num_experts = 0", "1..4096"});
  refused({.logits = floats({-1, 4})}, Gate::softmax(1, true), {"[-1, 4]"});
  refused({.logits = {nullptr, Dtype::float32, {2, 4}}}, Gate::softmax(1, true), {"[2, 4] float32 without data"});
}

TEST(RoutingErrors, Numbers) {
  refused({.logits = floats({2, 4})}, Gate::softmax(1, true, std::numeric_limits<float>::infinity()), {"scale = inf", "finite"});
  refused({.logits = floats({2, 4})}, Gate::sigmoid(1, true, 1, -1), {"epsilon = -1", "not negative"});
  refused({.logits = floats({2, 4})}, Gate::sigmoid(1, true, 1, std::numeric_limits<float>::quiet_NaN()), {"epsilon = nan"});
  Gate softmax = Gate::softmax(1, true);
  softmax.epsilon = 1e-3F;
  refused({.logits = floats({2, 4})}, softmax, {"epsilon = 0.001", "softmax over the chosen", "leave it 0"});
}

TEST(RoutingErrors, Groups) {
  const RoutingInput input{.logits = floats({2, 12})};
  refused(input, Gate::grouped_max(2, 5, 1), {"num_groups = 5", "num_experts = 12", "divisor"});
  refused(input, Gate::grouped_max(2, 0, 1), {"num_groups = 0"});
  refused(input, Gate::grouped_max(2, 4, 5), {"topk_groups = 5", "num_groups = 4", "1..4"});
  refused(input, Gate::grouped_max(2, 4, 0), {"topk_groups = 0", "1..4"});
  refused(input, Gate::grouped_max(7, 4, 2), {"top_k = 7", "6 experts", "topk_groups = 2", "groups of 3", "top_k <= 6"});
  refused(input, Gate::per_group(3, 2, Score::softmax, true), {"num_groups = 2", "top_k = 3"});
  Gate gate = Gate::softmax(2, true);
  gate.num_groups = 4;
  refused(input, gate, {"num_groups = 4", "softmax has no groups", "grouped_max"});
  gate = Gate::per_group(2, 2, Score::softmax, true);
  gate.topk_groups = 2;
  refused(input, gate, {"topk_groups = 2", "per_group keeps all groups"});
  gate.kind = static_cast<GateKind>(99);
  refused(input, gate, {"gate kind = 99"});
}

TEST(RoutingErrors, Bias) {
  const Gate gate = Gate::bias_corrected(2, Score::sigmoid, 1, 1, true);
  refused({.logits = floats({2, 4})}, gate, {"bias is absent", "[4] float32"});
  refused({.logits = floats({2, 4}), .bias = floats({5})}, gate, {"bias is [5] float32", "[4] float32"});
  refused({.logits = floats({2, 4}), .bias = {kNumbers.data(), Dtype::bfloat16, {4}}}, gate, {"bias is [4] bfloat16", "[4] float32"});
  refused({.logits = floats({2, 4}), .bias = floats({4})}, Gate::sigmoid(1, true), {"bias is [4] float32", "sigmoid takes none"});
}

TEST(RoutingErrors, Mask) {
  const std::vector<std::uint8_t> bytes(8, 1);
  const Gate gate = Gate::softmax(1, true);
  refused({.logits = floats({2, 4}), .mask = {bytes.data(), Dtype::uint8, {3}}}, gate, {"mask is [3] uint8", "[2] uint8"});
  refused({.logits = floats({2, 4}), .mask = floats({2})}, gate, {"mask is [2] float32", "[2] uint8"});
}

TEST(RoutingErrors, GivenIds) {
  const std::vector<std::int64_t> ids = {0, 1, 2, 4};
  const auto view = [&](std::initializer_list<std::int64_t> shape) { return ConstTensorView{ids.data(), Dtype::int64, shape}; };
  const Gate gate = Gate::softmax(2, true);
  refused({.logits = floats({2, 4}), .given_ids = view({2, 2})}, gate, {"given_ids[1, 1] = 4", "num_experts = 4", "below 4"});
  refused({.logits = floats({2, 4}), .given_ids = view({2, 1})}, gate, {"given_ids are [2, 1] int64", "[2, 2]"});
  refused({.logits = floats({1, 4}), .given_ids = view({2, 2})}, gate, {"given_ids are [2, 2] int64", "[1, 2]"});
  refused({.logits = floats({2, 4}), .given_ids = floats({2, 2})}, gate, {"given_ids are [2, 2] float32", "int64 or int32"});
}

}  // namespace
}  // namespace tokenyard
