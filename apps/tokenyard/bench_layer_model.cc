#include "bench_layer_model.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "memory/cuda_handle.h"
#include "tokenyard/placement.h"

namespace tokenyard::cli {
namespace {

constexpr Dtype kDtype = Dtype::bfloat16;
constexpr std::int64_t kBytes = 2;

float rounded(double value) { return bfloat16_to_float(float_to_bfloat16(static_cast<float>(value))); }

// A variance of one for sums of so many products of variance one.
double scale_for(std::int64_t terms) { return std::sqrt(3.0 / static_cast<double>(terms)); }

double dot(const float* a, const float* b, std::int64_t count) {
  double sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(a[i + j]) * b[i + j];
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

DeviceBuffer upload(int device, const void* host, std::size_t bytes) {
  DeviceBuffer buffer = value_or_throw(make_device_buffer(device, bytes));
  cuda_check(cudaMemcpy(buffer.data(), host, bytes, cudaMemcpyHostToDevice), "copying weights to the GPU");
  return buffer;
}

}  // namespace

DrawnTensor::DrawnTensor(unsigned seed, double scale, std::int64_t longest_row) : period_((std::int64_t{1} << 21) + 1031) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  const auto count = static_cast<std::size_t>(period_ + longest_row);
  bits_.reserve(count), values_.reserve(count);
  for (std::int64_t i = 0; i < period_; ++i) bits_.push_back(float_to_bfloat16(uniform(engine) * static_cast<float>(scale)));
  for (std::int64_t i = 0; i < longest_row; ++i) bits_.push_back(bits_[static_cast<std::size_t>(i)]);
  for (const std::uint16_t bits : bits_) values_.push_back(bfloat16_to_float(bits));
}

DeviceBuffer DrawnTensor::on_device(int device, std::int64_t first, std::int64_t count) const {
  DeviceBuffer buffer = value_or_throw(make_device_buffer(device, static_cast<std::size_t>(count * kBytes)));
  const DeviceBuffer drawn = upload(device, bits_.data(), static_cast<std::size_t>(period_ * kBytes));
  for (std::int64_t at = 0; at < count;) {
    const std::int64_t from = (first + at) % period_, part = std::min(period_ - from, count - at);
    cuda_check(cudaMemcpy(buffer.data() + at * kBytes, drawn.data() + from * kBytes, static_cast<std::size_t>(part * kBytes),
                          cudaMemcpyDeviceToDevice),
               "laying out weights");
    at += part;
  }
  return buffer;
}

LayerModel::LayerModel(const ModelPreset& preset, std::int64_t tokens)
    : preset_(preset),
      tokens_(tokens),
      hidden_(preset.hidden_size),
      width_(preset.expert_width),
      shared_width_(preset.shared_expert_width),
      x_(1, scale_for(1), hidden_),
      gate_(2, scale_for(hidden_), hidden_),
      w13_(3, scale_for(hidden_), hidden_),
      w2_(4, scale_for(width_), width_),
      shared_w13_(5, scale_for(hidden_), hidden_),
      shared_w2_(6, scale_for(std::max<std::int64_t>(shared_width_, 1)), shared_width_) {
  std::mt19937 engine(7);
  std::uniform_real_distribution<float> uniform(-0.05F, 0.05F);
  for (int e = 0; preset.has_gate_bias && e < preset.num_experts; ++e) selection_bias_.push_back(uniform(engine));
}

LayerModel::OnRank LayerModel::on_rank(int device, const Placement& placement, int rank) const {
  OnRank result;
  const auto keep = [&](DeviceBuffer buffer) {
    result.memory.push_back(std::move(buffer));
    return result.memory.back().data();
  };
  const auto local = placement.local_experts(rank);
  const auto experts = static_cast<std::int64_t>(local.size());
  const std::int64_t first = experts > 0 ? local[0] : 0, matrix = width_ * hidden_;
  MoeWeights& w = result.weights;
  w.gate.weight = {keep(gate_.on_device(device, 0, preset_.num_experts * hidden_)), kDtype, {preset_.num_experts, hidden_}};
  w.experts.w13 = {keep(w13_.on_device(device, first * 2 * matrix, experts * 2 * matrix)), kDtype, {experts, 2, width_, hidden_}};
  w.experts.w2 = {keep(w2_.on_device(device, first * matrix, experts * matrix)), kDtype, {experts, hidden_, width_}};
  if (!selection_bias_.empty())
    w.gate.selection_bias = {
        keep(upload(device, selection_bias_.data(), selection_bias_.size() * 4)), Dtype::float32, {preset_.num_experts}};
  if (shared_width_ == 0) return result;
  w.shared.weights.w13 = {keep(shared_w13_.on_device(device, 0, 2 * shared_width_ * hidden_)), kDtype, {1, 2, shared_width_, hidden_}};
  w.shared.weights.w2 = {keep(shared_w2_.on_device(device, 0, shared_width_ * hidden_)), kDtype, {1, hidden_, shared_width_}};
  return result;
}

DeviceBuffer LayerModel::rows(int device, int rank) const { return x_.on_device(device, rank * tokens_ * hidden_, tokens_ * hidden_); }

std::vector<float> LayerModel::feed_forward(const float* x, const DrawnTensor& w13, const DrawnTensor& w2, std::int64_t expert,
                                            std::int64_t width) const {
  std::vector<float> act, y;
  for (std::int64_t i = 0; i < width; ++i) {
    const float gate = rounded(dot(x, w13.at((expert * 2 * width + i) * hidden_), hidden_));
    const float up = rounded(dot(x, w13.at((expert * 2 * width + width + i) * hidden_), hidden_));
    act.push_back(rounded(gate / (1.0 + std::exp(-static_cast<double>(gate))) * up));
  }
  for (std::int64_t h = 0; h < hidden_; ++h) y.push_back(rounded(dot(act.data(), w2.at((expert * hidden_ + h) * width), width)));
  return y;
}

std::vector<float> LayerModel::expected(int rank, std::int64_t token, std::span<const std::int64_t> experts,
                                        std::span<const float> weights) const {
  const float* x = row(rank, token);
  std::vector<float> sum(static_cast<std::size_t>(hidden_));
  const auto add = [&](const std::vector<float>& y, float weight) {
    for (std::size_t h = 0; h < sum.size(); ++h) sum[h] += weight * y[h];
  };
  for (std::size_t k = 0; k < experts.size(); ++k) add(feed_forward(x, w13_, w2_, experts[k], width_), weights[k]);
  if (shared_width_ > 0) add(feed_forward(x, shared_w13_, shared_w2_, 0, shared_width_), 1.0F);
  return sum;
}

std::vector<float> LayerModel::logits(int rank, std::int64_t token) const {
  std::vector<float> logits;
  for (int e = 0; e < preset_.num_experts; ++e) logits.push_back(static_cast<float>(dot(row(rank, token), gate_.at(e * hidden_), hidden_)));
  return logits;
}

double LayerModel::flops(std::int64_t expert_rows) const {
  const auto product = [this](double rows, std::int64_t outputs) { return 2.0 * rows * static_cast<double>(hidden_ * outputs); };
  const auto tokens = static_cast<double>(tokens_);
  return product(static_cast<double>(expert_rows), 3 * width_) + product(tokens, 3 * shared_width_) + product(tokens, preset_.num_experts);
}

double LayerModel::weight_bytes(std::int64_t experts_with_rows) const {
  const std::int64_t elements = experts_with_rows * 3 * width_ * hidden_ + 3 * shared_width_ * hidden_ + preset_.num_experts * hidden_;
  return static_cast<double>(kBytes * elements);
}

}  // namespace tokenyard::cli
