#pragma once
// Collectives on GPUs called with tensors of the host, so that checks of all other collectives serve.

#include <functional>

#include "device/device_tensors.h"
#include "tokenyard/collective.h"

namespace tokenyard::device_test {

class ThroughGpus final : public Collectives {
 public:
  using Counts = std::span<const std::int64_t>;

  ThroughGpus(DeviceCollectives& device, DeviceTensors& tensors, CUstream_st* stream)
      : device_(device), tensors_(tensors), stream_(stream) {}

  void barrier() override { world().barrier(); }
  void all_gather_v(const ConstTensorView& in, Counts counts, const TensorView& out) override {
    const TensorView to = place(out);
    device_.all_gather_v(tensors_.place(in), counts, to, stream_);
    finish(out);
  }
  void reduce_scatter_v(const ConstTensorView& in, Counts counts, const TensorView& out) override {
    tensors_.clear();
    const TensorView from = tensors_.place(in);
    device_.reduce_scatter_v(from, counts, tensors_.place(out), stream_);
    finish(out);
  }
  void all_to_all_v(const ConstTensorView& in, Counts send_counts, const TensorView& out, Counts receive_counts) override {
    const TensorView to = place(out);
    const AllToAllRows table{tensors_.place(in), send_counts, to, receive_counts};
    device_.all_to_all_v(std::span(&table, 1), stream_);
    finish(out);
  }
  void abandon(const Failure&) override {}
  void cancel() override {}
  const World& world() const override { return device_.world(); }
  Transport transport() const override { return device_.transport(); }

 private:
  // First what the other one may be a part of.
  TensorView place(const ConstTensorView& host) {
    tensors_.clear();
    return tensors_.place(host);
  }
  void finish(const TensorView& out) {
    device_.wait(stream_);
    tensors_.fetch(out);
  }

  DeviceCollectives& device_;
  DeviceTensors& tensors_;
  CUstream_st* stream_;
};

}  // namespace tokenyard::device_test
