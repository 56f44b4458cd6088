#include "demo_model.h"

#include <cmath>
#include <numeric>
#include <random>

#include "workload.h"

namespace tokenyard::cli {
namespace {

// Which bytes shape a row, and how much: itself most, then what stands before and after it.
struct Neighbour {
  int offset;
  float share;
};
constexpr Neighbour kNeighbours[] = {{0, 1.0F}, {-1, 0.6F}, {-2, 0.35F}, {1, 0.35F}};
constexpr float kPositionShare = 0.1F;
constexpr float kGateGain = 1.5F;  // how decided the gate is

// Not std::normal_distribution: its numbers differ between standard libraries.
std::vector<float> random_values(std::size_t count, float scale, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    const double uniform = static_cast<double>(random() >> 11) * 0x1p-53;
    value = static_cast<float>((uniform - 0.5) * std::sqrt(12.0)) * scale;  // variance scale^2
  }
  return values;
}

// out += x * row, the step of a matrix product whose inner loop runs along memory.
void add_scaled(std::vector<float>& out, float x, const float* row) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += x * row[i];
}

}  // namespace

DemoModel::DemoModel(const DemoSettings& settings)
    : preset_(model_preset(settings.preset)),
      dtype_(parse_dtype(settings.dtype)),
      hidden_size_(settings.hidden_size),
      expert_width_(settings.expert_width) {
  const auto hidden = static_cast<std::size_t>(hidden_size_);
  const auto width = static_cast<std::size_t>(expert_width_);
  const auto experts = static_cast<std::size_t>(preset_.num_experts);
  const auto seed = static_cast<std::uint64_t>(settings.seed) * 16;
  const float in_scale = 1.0F / std::sqrt(static_cast<float>(hidden));
  const float out_scale = 1.0F / std::sqrt(static_cast<float>(width));
  embeddings_ = random_values(std::size(kNeighbours) * 256 * hidden, 1.0F, seed);
  gate_ = random_values(hidden * experts, kGateGain * in_scale, seed + 1);
  if (preset_.has_gate_bias) gate_bias_ = random_values(experts, 0.05F, seed + 2);
  gate_up_ = random_values(experts * hidden * 2 * width, in_scale, seed + 3);
  down_ = random_values(experts * width * hidden, out_scale, seed + 4);
}

void DemoModel::embed(const std::string& text, std::int64_t position, std::byte* row) const {
  std::vector<float> values(static_cast<std::size_t>(hidden_size_), 0);
  float total = kPositionShare * kPositionShare;
  for (std::size_t n = 0; n < std::size(kNeighbours); ++n) {
    const std::int64_t at = position + kNeighbours[n].offset;
    if (at < 0 || at >= std::ssize(text)) continue;
    const auto byte = static_cast<unsigned char>(text[static_cast<std::size_t>(at)]);
    add_scaled(values, kNeighbours[n].share, embeddings_.data() + (n * 256 + byte) * values.size());
    total += kNeighbours[n].share * kNeighbours[n].share;
  }
  const float normal = 1.0F / std::sqrt(total);
  for (std::size_t h = 0; h < values.size(); ++h) {
    const auto turns = static_cast<double>(position) / static_cast<double>(std::size_t{2} << (h % 12));
    values[h] = (values[h] + kPositionShare * static_cast<float>(std::sin(turns))) * normal;
  }
  encode(dtype_, values, row);
}

MoeWeights DemoModel::weights(std::span<const int> local_experts) const {
  const auto count = std::ssize(local_experts);
  const std::int64_t first = local_experts.empty() ? 0 : local_experts.front();
  const std::int64_t elements = expert_width_ * hidden_size_;
  MoeWeights weights;
  weights.gate.weight = {gate_.data(), Dtype::float32, {preset_.num_experts, hidden_size_}};
  if (!gate_bias_.empty()) weights.gate.selection_bias = {gate_bias_.data(), Dtype::float32, {preset_.num_experts}};
  weights.experts.w13 = {gate_up_.data() + first * 2 * elements, Dtype::float32, {count, 2, expert_width_, hidden_size_}};
  weights.experts.w2 = {down_.data() + first * elements, Dtype::float32, {count, hidden_size_, expert_width_}};
  return weights;
}

void DemoModel::add_expert(int index, const std::byte* row, double weight, std::span<double> sums, std::span<double> magnitudes) const {
  const auto width = static_cast<std::size_t>(expert_width_);
  std::vector<float> x(static_cast<std::size_t>(hidden_size_));
  decode(dtype_, row, x);
  const float* gate = gate_up_.data() + static_cast<std::size_t>(index) * 2 * width * x.size();
  const float* down = down_.data() + static_cast<std::size_t>(index) * x.size() * width;
  for (std::size_t i = 0; i < width; ++i, gate += x.size()) {
    const double g = std::inner_product(x.begin(), x.end(), gate, 0.0);
    const double inner = weight * g / (1.0 + std::exp(-g)) * std::inner_product(x.begin(), x.end(), gate + width * x.size(), 0.0);
    for (std::size_t h = 0; h < sums.size(); ++h) {
      sums[h] += inner * down[h * width + i];
      magnitudes[h] += std::abs(inner * down[h * width + i]);
    }
  }
}

}  // namespace tokenyard::cli
