// The measuring of bench experts.

#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <stdexcept>

#include "bench_experts.h"
#include "cublas.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/device_experts.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

constexpr int kSets = 2;  // of rows: one is read while the other has left the cache

// Random numbers in [-1, 1), drawn once and laid end to end.
DeviceBuffer random_buffer(std::size_t elements, Dtype dtype, unsigned seed) {
  constexpr std::size_t kDrawn = (std::size_t{1} << 21) + 1031;  // no row length repeats in step with it
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  std::vector<std::uint16_t> drawn(std::min(elements, kDrawn));
  for (std::uint16_t& value : drawn)
    value = dtype == Dtype::bfloat16 ? float_to_bfloat16(uniform(engine)) : float_to_float16(uniform(engine));
  DeviceBuffer buffer = value_or_throw(make_device_buffer(0, elements * sizeof(std::uint16_t)));
  for (std::size_t at = 0; at < elements; at += drawn.size()) {
    const std::size_t count = std::min(drawn.size(), elements - at);
    cuda_check(cudaMemcpy(buffer.as<std::uint16_t>() + at, drawn.data(), count * sizeof(std::uint16_t), cudaMemcpyHostToDevice),
               "cudaMemcpy");
  }
  return buffer;
}

// How rows are shared out. even: all groups alike; routed: each row to a random group, as a balanced gate does; skewed: one group has four
// times the mean, every eighth is empty, the others differ.
enum class Sharing : std::uint8_t { even, routed, skewed };
constexpr std::pair<Sharing, const char*> kSharings[] = {{Sharing::even, "even"}, {Sharing::routed, "routed"}, {Sharing::skewed, "skewed"}};

std::vector<std::int32_t> counts_of(const ExpertsSettings& settings, Sharing sharing) {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(settings.groups), settings.rows);
  if (sharing == Sharing::even) return counts;
  const std::int64_t total = std::int64_t{settings.rows} * settings.groups;
  if (sharing == Sharing::routed) {
    std::fill(counts.begin(), counts.end(), 0);
    std::mt19937 engine(7);
    std::uniform_int_distribution<std::size_t> group(0, counts.size() - 1);
    for (std::int64_t row = 0; row < total; ++row) ++counts[group(engine)];
    return counts;
  }
  const std::int64_t most = std::min<std::int64_t>(total, 4LL * settings.rows);
  std::vector<double> shares;
  for (int g = 0; g < settings.groups; ++g) shares.push_back(g == 0 || g % 8 == 3 ? 0.0 : 0.2 + static_cast<double>(g * 37 % 64) / 64);
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::int64_t left = total - most;
  for (int g = 1; g < settings.groups; ++g) {
    counts[static_cast<std::size_t>(g)] =
        sum > 0 ? static_cast<std::int32_t>(shares[static_cast<std::size_t>(g)] / sum * static_cast<double>(total - most)) : 0;
    left -= counts[static_cast<std::size_t>(g)];
  }
  counts[0] = static_cast<std::int32_t>(most + left);
  return counts;
}

// A product of one shape, its tensors and what it should give.
class Workload {
 public:
  Workload(const ExpertsSettings& settings, ProductShape shape, Sharing sharing)
      : settings_(settings), shape_(shape), counts_(counts_of(settings, sharing)), begins_(counts_.size()) {
    std::exclusive_scan(counts_.begin(), counts_.end(), begins_.begin(), 0);
    places_ = std::int64_t{settings.rows} * settings.groups;
    for (unsigned set = 0; set < kSets; ++set) {
      x_.push_back(random_buffer(static_cast<std::size_t>(places_ * shape.inputs), settings.dtype, 1 + set));
      dy_.push_back(random_buffer(static_cast<std::size_t>(places_ * shape.outputs), settings.dtype, 11 + set));
    }
    weights_ = random_buffer(matrix_elements(), settings.dtype, 21);
    out_ = value_or_throw(make_device_buffer(0, static_cast<std::size_t>(places_ * std::max(shape.outputs, shape.inputs)) * 2));
    dw_ = value_or_throw(make_device_buffer(0, matrix_elements() * sizeof(float)));
    pointers_ = value_or_throw(make_device_buffer(0, counts_.size() * 3 * sizeof(void*)));
    for (auto [table, numbers] : {std::pair{&counts_table_, &counts_}, std::pair{&begins_table_, &begins_}}) {
      *table = value_or_throw(make_device_buffer(0, numbers->size() * sizeof(std::int32_t)));
      cuda_check(cudaMemcpy(table->data(), numbers->data(), numbers->size() * sizeof(std::int32_t), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
  }

  // forward, dgrad, wgrad
  static constexpr const char* kNames[] = {"forward", "dgrad", "wgrad"};
  void run(int product, int set, DeviceExperts& experts, cudaStream_t stream) const {
    const std::int64_t n = shape_.outputs, k = shape_.inputs, groups = settings_.groups;
    const ConstTensorView x(x_[set].data(), settings_.dtype, {places_, k}), dy(dy_[set].data(), settings_.dtype, {places_, n});
    const ConstTensorView w(weights_.data(), settings_.dtype, {groups, n, k});
    const DeviceRowGroups rows = {.places = places_,
                                  .counts = {counts_table_.data(), Dtype::int32, {groups}},
                                  .begins = {begins_table_.data(), Dtype::int32, {groups}}};
    if (product == 0) experts.grouped_gemm(x, rows, w, {}, {out_.data(), settings_.dtype, {places_, n}}, stream);
    if (product == 1) experts.grouped_gemm_dgrad(dy, rows, w, {out_.data(), settings_.dtype, {places_, k}}, stream);
    if (product == 2) experts.grouped_gemm_wgrad(dy, x, rows, {dw_.data(), Dtype::float32, {groups, n, k}}, stream);
  }
  // The same as a matrix product for each group that has rows.
  std::vector<MatrixProduct> products(int product, int set) const {
    std::vector<MatrixProduct> all;
    const int n = shape_.outputs, k = shape_.inputs;
    for (std::size_t g = 0; g < counts_.size(); ++g) {
      if (counts_[g] == 0) continue;
      const std::int64_t begin = begins_[g], matrix = static_cast<std::int64_t>(g) * n * k;
      const std::byte *const x = x_[set].data() + begin * k * 2, *const dy = dy_[set].data() + begin * n * 2,
                             *const w = weights_.data() + matrix * 2;
      if (product == 0) all.push_back({counts_[g], n, k, x, w, out_.data() + begin * n * 2, false, true, false});
      if (product == 1) all.push_back({counts_[g], k, n, dy, w, out_.data() + begin * k * 2, false, false, false});
      if (product == 2) all.push_back({n, k, counts_[g], dy, x, dw_.data() + matrix * 4, true, false, true});
    }
    return all;
  }
  void* pointers() const { return pointers_.data(); }
  double flops() const { return 2.0 * static_cast<double>(places_) * shape_.outputs * shape_.inputs; }
  // Each operand once: what wgrad adds to is read and written, and of the weights those of groups with rows.
  double bytes(int product) const {
    const auto used = static_cast<double>(std::count_if(counts_.begin(), counts_.end(), [](std::int32_t count) { return count > 0; }));
    const double rows = 2.0 * static_cast<double>(places_) * (shape_.outputs + shape_.inputs);
    return rows + used * shape_.outputs * shape_.inputs * (product == 2 ? 8.0 : 2.0);
  }
  // Some elements of the result of set 0, against sums in float64.
  void check(int product, DeviceExperts& experts, cudaStream_t stream) const;

 private:
  std::size_t matrix_elements() const {
    return static_cast<std::size_t>(settings_.groups) * static_cast<std::size_t>(shape_.outputs) * static_cast<std::size_t>(shape_.inputs);
  }
  std::vector<double> column(const void* first, std::int64_t stride, int count) const;

  const ExpertsSettings& settings_;
  ProductShape shape_;
  std::vector<std::int32_t> counts_, begins_;
  std::int64_t places_ = 0;
  std::vector<DeviceBuffer> x_, dy_;
  DeviceBuffer weights_, out_, dw_, pointers_, counts_table_, begins_table_;
};

// Numbers that lie `stride` elements apart.
std::vector<double> Workload::column(const void* first, std::int64_t stride, int count) const {
  std::vector<std::uint16_t> halves(static_cast<std::size_t>(count));
  cuda_check(cudaMemcpy2D(halves.data(), 2, first, static_cast<std::size_t>(stride) * 2, 2, halves.size(), cudaMemcpyDeviceToHost),
             "cudaMemcpy2D");
  std::vector<double> values;
  for (const std::uint16_t half : halves)
    values.push_back(settings_.dtype == Dtype::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half));
  return values;
}

void Workload::check(int product, DeviceExperts& experts, cudaStream_t stream) const {
  cuda_check(cudaMemset(out_.data(), 0xff, out_.bytes()), "cudaMemset");  // NaN
  cuda_check(cudaMemset(dw_.data(), 0, dw_.bytes()), "cudaMemset");
  run(product, 0, experts, stream);
  cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  std::mt19937 engine(5);
  const auto draw = [&engine](int below) { return std::uniform_int_distribution<int>(0, below - 1)(engine); };
  double error = 0, size = 0;
  constexpr int kSamples = 200;
  const std::vector<MatrixProduct> all = products(product, 0);
  for (int sample = 0; sample < kSamples; ++sample) {
    const MatrixProduct& p = all[static_cast<std::size_t>(draw(static_cast<int>(all.size())))];
    const int m = sample % 2 == 0 ? p.m - 1 - draw(std::min(p.m, 16)) : draw(p.m), n = draw(p.n);  // half of them near the end of a group
    const auto* const a = static_cast<const std::byte*>(p.a) + 2 * (p.a_transposed ? m : std::int64_t{m} * p.k);
    const auto* const b = static_cast<const std::byte*>(p.b) + 2 * (p.b_transposed ? std::int64_t{n} * p.k : n);
    const std::vector<double> row = column(a, p.a_transposed ? p.m : 1, p.k), factors = column(b, p.b_transposed ? 1 : p.n, p.k);
    const double expected = std::inner_product(row.begin(), row.end(), factors.begin(), 0.0);
    const std::int64_t at = std::int64_t{m} * p.n + n;
    double seen = 0;
    if (p.accumulate) {
      float value = 0;
      cuda_check(cudaMemcpy(&value, static_cast<const float*>(p.c) + at, sizeof value, cudaMemcpyDeviceToHost), "cudaMemcpy");
      seen = value;
    } else {
      seen = column(static_cast<const std::byte*>(p.c) + 2 * at, 1, 1)[0];
    }
    error += (seen - expected) * (seen - expected);
    size += expected * expected;
  }
  if (!(std::sqrt(error) <= 1e-2 * std::sqrt(size))) {
    throw std::runtime_error(fmt::format("{} {}x{} is wrong: {} of {} samples' norm", kNames[product], shape_.outputs, shape_.inputs,
                                         std::sqrt(error), std::sqrt(size)));
  }
}

// Microseconds of each iteration, by events on the stream.
std::vector<double> time_calls(const ExpertsSettings& settings, cudaStream_t stream, const std::function<bool(int)>& call) {
  cudaEvent_t raw[2] = {};
  for (cudaEvent_t& event : raw) cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  const CudaEvent begin(raw[0]), end(raw[1]);
  std::vector<double> times;
  for (int i = -settings.warmup; i < settings.iterations; ++i) {
    cuda_check(cudaEventRecord(begin.get(), stream), "cudaEventRecord");
    if (!call((i + settings.warmup) % kSets)) return {};
    cuda_check(cudaEventRecord(end.get(), stream), "cudaEventRecord");
    cuda_check(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
    float milliseconds = 0;
    cuda_check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(1e3 * milliseconds);
  }
  std::sort(times.begin(), times.end());
  return times;
}

json median_or_none(const std::vector<double>& sorted) { return sorted.empty() ? json() : json(sorted[sorted.size() / 2]); }

struct Ceilings {
  double flops_per_us = 0;
  double bytes_per_us = 0;
};

// A large copy within the GPU, and a large matrix product.
Ceilings measure_ceilings(const ExpertsSettings& settings, Cublas& cublas, cudaStream_t stream) {
  constexpr int kSize = 8192;
  constexpr std::size_t kBytes = std::size_t{2} << 30;
  constexpr std::size_t kElements = std::size_t{kSize} * kSize;
  Ceilings ceilings;
  const DeviceBuffer from = random_buffer(kBytes / 2, settings.dtype, 31), to = value_or_throw(make_device_buffer(0, kBytes));
  const auto copy = time_calls(settings, stream, [&](int) {
    return cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, stream) == cudaSuccess;
  });
  ceilings.bytes_per_us = 2.0 * static_cast<double>(kBytes) / median_or_none(copy).get<double>();
  const std::vector<MatrixProduct> product = {
      {kSize, kSize, kSize, from.data(), from.data() + 2 * kElements, to.data(), false, true, false}};
  const json us = median_or_none(time_calls(settings, stream, [&](int) { return cublas.loop(product, stream); }));
  if (us.is_number()) ceilings.flops_per_us = 2.0 * std::pow(kSize, 3) / us.get<double>();
  return ceilings;
}

json figure_of(const Workload& workload, int product, const std::vector<double>& times, const Ceilings& ceilings) {
  const double middle = times[times.size() / 2];
  const double by_bytes = workload.bytes(product) / ceilings.bytes_per_us;
  const double bound = std::max(by_bytes, ceilings.flops_per_us > 0 ? workload.flops() / ceilings.flops_per_us : 0.0);
  return {{"min_us", times.front()},   {"median_us", middle},
          {"max_us", times.back()},    {"teraflops", workload.flops() / middle / 1e6},
          {"flops", workload.flops()}, {"bytes", workload.bytes(product)},
          {"bound_us", bound},         {"ratio_to_bound", bound / middle}};
}

}  // namespace

json measure_experts(const ExpertsSettings& settings) {
  const CudaDeviceScope scope(0);
  cuda_check(scope.status(), "cudaSetDevice of GPU 0");
  const auto stream = value_or_throw(borrow_cuda_stream());
  Cublas cublas(settings.dtype);
  DeviceExperts experts({.device = 0, .sm_margin = settings.sm_margin});
  const Ceilings ceilings = measure_ceilings(settings, cublas, stream.get());
  cudaDeviceProp properties = {};
  cuda_check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  json runs = json::array();
  for (const ProductShape& shape : settings.shapes) {
    for (const auto& [sharing, name] : kSharings) {
      const Workload workload(settings, shape, sharing);
      json figures;
      for (int product = 0; product < 3; ++product) {
        workload.check(product, experts, stream.get());
        const auto ours = time_calls(settings, stream.get(), [&](int set) {
          workload.run(product, set, experts, stream.get());
          return true;
        });
        json figure = figure_of(workload, product, ours, ceilings);
        const std::vector<MatrixProduct> sets[kSets] = {workload.products(product, 0), workload.products(product, 1)};
        figure["cublas_loop_us"] =
            median_or_none(time_calls(settings, stream.get(), [&](int set) { return cublas.loop(sets[set], stream.get()); }));
        cublas.prepare_grouped(sets[0], workload.pointers(), stream.get());
        figure["cublas_grouped_us"] = median_or_none(
            time_calls(settings, stream.get(), [&](int) { return cublas.grouped(sets[0], workload.pointers(), stream.get()); }));
        figures[Workload::kNames[product]] = figure;
      }
      runs.push_back({{"outputs", shape.outputs}, {"inputs", shape.inputs}, {"groups", name}, {"figures", figures}});
    }
  }
  return {{"gpu", properties.name},
          {"ceilings", {{"teraflops", ceilings.flops_per_us / 1e6}, {"terabytes_per_second", ceilings.bytes_per_us / 1e6}}},
          {"baselines", {{"why_not", cublas.missing()}}},
          {"runs", runs}};
}

}  // namespace tokenyard::cli
