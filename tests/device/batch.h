#pragma once
// One rank's tokens, on its GPU and on the host: drawn again in the same memory as often as a test likes.

#include <cstdint>
#include <vector>

#include "device/device_side.h"
#include "tokenyard/exchange.h"

namespace tokenyard::device_test {

struct BatchShape {
  std::int64_t max_tokens = 24;
  std::int64_t hidden_size = 64;  // float32
  int experts = 8;
  int top_k = 3;
};

class Batch {
 public:
  // Before the exchange is made: allocates, and makes the rank's GPU current.
  explicit Batch(const World& world, const BatchShape& shape = {});

  // What an exchange of such batches on this rank's GPU needs.
  ExchangeOptions options() const;
  Placement placement() const { return Placement::uniform(shape_.experts, ranks_); }

  // Other rows, ids and weights. Rows are eighths, so that a few of them add up without rounding; ids are experts. Waits for stream().
  void draw(unsigned seed) { draw(seed, shape_.max_tokens); }
  void draw(unsigned seed, std::int64_t tokens);
  // One id, or weight, of this batch alone.
  void set_id(std::int64_t token, int k, std::int64_t id);
  void set_weight(std::int64_t token, int k, float weight);

  DispatchInput input(Device where = Device::cuda) const;
  DispatchInput rows_only(Device where = Device::cuda) const;
  std::int64_t tokens() const { return tokens_; }
  // What combine brings back of rows that nobody changed, in a layout with a row per (token, k), if only these experts live.
  std::vector<float> sums(const std::vector<bool>& lives) const;

  // A view on the host of what lies on the GPU; `copy` is its memory. Waits for stream() first.
  ConstTensorView fetch(const ConstTensorView& view, exchange_test::Bytes& copy) const { return side_.fetch(view, copy); }
  // Device memory as long as the batch lives, beside everything that draw() uses.
  std::byte* reserve(std::size_t bytes);
  cudaStream_t stream() const { return static_cast<cudaStream_t>(side_.stream()); }
  const BatchShape& shape() const { return shape_; }

 private:
  struct Tensor {
    exchange_test::Bytes bytes;
    void* device = nullptr;
    Dtype dtype = Dtype::float32;
    std::int64_t columns = 0;
    TensorView view(Device where, std::int64_t tokens) const;
  };
  void make(Tensor& tensor, Dtype dtype, std::int64_t columns);

  BatchShape shape_;
  int rank_;
  int ranks_;
  int gpu_;
  std::int64_t tokens_ = 0;
  DeviceBuffer pool_;
  DeviceSide side_;
  Tensor rows_, ids_, weights_;
};

}  // namespace tokenyard::device_test
