#include "device/batch.h"

#include <random>

#include "device/gpus.h"
#include "device/hold.h"

namespace tokenyard::device_test {
namespace {

constexpr std::size_t kPoolBytes = std::size_t{48} << 20;

template <class T>
T* values(exchange_test::Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.data());
}

}  // namespace

Batch::Batch(const World& world, const BatchShape& shape)
    : shape_(shape),
      rank_(world.rank()),
      ranks_(world.size()),
      gpu_(use_gpu_of(world.rank())),
      pool_(value_or_throw(make_device_buffer(gpu_, kPoolBytes))),
      side_(pool_, gpu_, ranks_) {
  load_hold();
  make(rows_, Dtype::float32, shape.hidden_size);
  make(ids_, Dtype::int64, shape.top_k);
  make(weights_, Dtype::float32, shape.top_k);
  draw(0);
}

void Batch::make(Tensor& tensor, Dtype dtype, std::int64_t columns) {
  tensor.dtype = dtype;
  tensor.columns = columns;
  tensor.bytes.resize(shape_.max_tokens * columns * size_of(dtype));
  tensor.device = side_.place(tensor.bytes);
}

std::byte* Batch::reserve(std::size_t bytes) {
  exchange_test::Bytes zeros(bytes);
  return static_cast<std::byte*>(side_.place(zeros));
}

ExchangeOptions Batch::options() const {
  ExchangeOptions options;
  options.max_tokens_per_rank = shape_.max_tokens;
  options.max_row_bytes = shape_.hidden_size * 4;
  options.top_k = shape_.top_k;
  options.max_local_experts = shape_.experts;
  side_.adapt(options);
  return options;
}

void Batch::draw(unsigned seed, std::int64_t tokens) {
  tokens_ = tokens;
  std::mt19937 random(seed * 1000 + static_cast<unsigned>(rank_));
  for (std::int64_t i = 0; i < tokens * rows_.columns; ++i) {
    values<float>(rows_.bytes)[i] = static_cast<float>(static_cast<int>(random() % 65'536) - 32'768) / 8.0F;
  }
  for (std::int64_t i = 0; i < tokens * ids_.columns; ++i) {
    values<std::int64_t>(ids_.bytes)[i] = random() % static_cast<unsigned>(shape_.experts);
    values<float>(weights_.bytes)[i] = static_cast<float>(1 + random() % 1'000'000) / 1'000'000.0F;
  }
  for (const Tensor* tensor : {&rows_, &ids_, &weights_}) side_.write(tensor->device, tensor->bytes);
}

void Batch::set_id(std::int64_t token, int k, std::int64_t id) {
  values<std::int64_t>(ids_.bytes)[token * ids_.columns + k] = id;
  side_.write(ids_.device, ids_.bytes);
}

void Batch::set_weight(std::int64_t token, int k, float weight) {
  values<float>(weights_.bytes)[token * weights_.columns + k] = weight;
  side_.write(weights_.device, weights_.bytes);
}

TensorView Batch::Tensor::view(Device where, std::int64_t tokens) const {
  void* const data = where == Device::cuda ? device : const_cast<std::uint8_t*>(bytes.data());
  return {data, dtype, {tokens, columns}};
}

DispatchInput Batch::input(Device where) const {
  return {.rows = rows_.view(where, tokens_),
          .scales = {},
          .topk_ids = ids_.view(where, tokens_),
          .topk_weights = weights_.view(where, tokens_)};
}

DispatchInput Batch::rows_only(Device where) const {
  return {.rows = rows_.view(where, tokens_), .scales = {}, .topk_ids = {}, .topk_weights = {}};
}

std::vector<float> Batch::sums(const std::vector<bool>& lives) const {
  const auto* const rows = reinterpret_cast<const float*>(rows_.bytes.data());
  const auto* const ids = reinterpret_cast<const std::int64_t*>(ids_.bytes.data());
  std::vector<float> sums;
  for (std::int64_t token = 0; token < tokens_; ++token) {
    int terms = 0;
    for (int k = 0; k < shape_.top_k; ++k) terms += lives[ids[token * shape_.top_k + k]] ? 1 : 0;
    for (std::int64_t h = 0; h < shape_.hidden_size; ++h) sums.push_back(static_cast<float>(terms) * rows[token * shape_.hidden_size + h]);
  }
  return sums;
}

}  // namespace tokenyard::device_test
