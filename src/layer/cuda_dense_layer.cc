// A DenseLayer on a GPU: checks, memory and order around CudaDense.

#include "experts/row_block.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda_dense.h"
#include "layer/moe_engine.h"
#include "layer/steps.h"

namespace tokenyard::layer_internal {
namespace {

class CudaDenseLayer final : public DenseEngine {
 public:
  CudaDenseLayer(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights, const Activation& activation);
  void forward(const ConstTensorView& x, const TensorView& out, DenseActivations* saved, void* stream) override;
  void backward(const Backward& call, const DenseActivations& saved) override;
  void check_gradients(const DenseGradients& gradients) const override { dense_.check_gradients(gradients); }

 private:
  DeviceWorkspace& workspace() const { return *group_->workspace(); }
  // Two matrices like those of a step.
  void check(const ConstTensorView& x, const char* what, const ConstTensorView& other) const;
  CudaDenseStep& prepare(DenseStep& saved, const ConstTensorView& x, void* stream) const;
  // Runs a step behind what the group does; when it cannot go on, the ranks that share the weights learn why.
  template <class Step>
  void guarded(void* stream, Step&& step);

  std::shared_ptr<ExpertGroup> group_;
  CudaDense dense_;
};

CudaDenseLayer::CudaDenseLayer(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights, const Activation& activation)
    : group_(std::move(group)), dense_(*group_, weights, activation) {
  const ExpertGroupOptions& most = group_->options();
  if (dense_.hidden_size() > most.hidden_size || size_of(dense_.dtype()) > size_of(most.dtype)) {
    usage_error("w13 is {}; the group was made for rows of at most {} {}", describe(weights.weights.w13), most.hidden_size,
                name(most.dtype));
  }
  const CudaDeviceScope scope(workspace().device());
  const auto stream = value_or_throw(borrow_cuda_stream());
  workspace().order().enter(stream.get());
  dense_.rehearse(stream.get());
  if (most.gradients) {
    dense_.rehearse_backward(stream.get());
    workspace().blocks().reserve(dense_.step_bytes());
  }
  workspace().order().leave(stream.get());
  cuda_check(cudaStreamSynchronize(stream.get()), "rehearsing a layer");
  group_->world().barrier();
}

void CudaDenseLayer::check(const ConstTensorView& x, const char* what, const ConstTensorView& other) const {
  const std::int64_t rows = x.ndim == 2 ? x.shape[0] : 0, most = group_->options().max_tokens_per_rank;
  experts_internal::check_rows("x", x, rows, dense_.hidden_size());
  experts_internal::check_rows(what, other, rows, dense_.hidden_size());
  if (rows > most) usage_error("x is {}; the group was made for at most {} tokens", describe(x), most);
  if (x.dtype != dense_.dtype() || other.dtype != x.dtype) {
    usage_error("x is {}, {} {} and the weights are {}; on GPUs use one dtype", describe(x), what, describe(other), name(dense_.dtype()));
  }
  check_on_gpu("x", x, workspace().device());
  check_on_gpu(what, other, workspace().device());
}

CudaDenseStep& CudaDenseLayer::prepare(DenseStep& saved, const ConstTensorView& x, void* stream) const {
  if (!group_->options().gradients) {
    usage_error("activations for backward, of a group on GPUs without gradients; make it with ExpertGroupOptions::gradients, or give none");
  }
  if (saved.on_gpu == nullptr) saved.on_gpu = std::make_shared<CudaDenseMemory>();
  CudaDenseMemory& step = *saved.on_gpu;
  step.memory.clear();
  dense_.place(step.dense, step.memory, x.shape[0], x.dtype);
  step.memory.take(workspace().blocks(), stream_of(stream));
  step.num_tokens = x.shape[0];
  return step.dense;
}

template <class Step>
void CudaDenseLayer::guarded(void* stream, Step&& step) {
  const CudaDeviceScope scope(workspace().device());
  group_->check();  // of earlier steps: this one is not begun
  try {
    step();
  } catch (const UsageError& error) {
    dense_.leave(error.what(), stream);
    throw;
  } catch (const TransportError& error) {
    if (error.failure().kind == FailureKind::aborted) dense_.leave(error.failure().detail, stream);
    throw;
  }
}

void CudaDenseLayer::forward(const ConstTensorView& x, const TensorView& out, DenseActivations* saved, void* stream) {
  guarded(stream, [&] {
    dense_.begin_forward();
    check(x, "out", out);
    const CudaDenseStep* const step = saved != nullptr ? &prepare(saved->step(), x, stream) : nullptr;
    workspace().order().enter(stream_of(stream));
    dense_.forward(x, out, step, stream);
    workspace().order().leave(stream_of(stream));
  });
}

void CudaDenseLayer::backward(const Backward& call, const DenseActivations& saved) {
  const CudaDenseMemory* const step = saved.step().on_gpu.get();
  guarded(call.stream, [&] {
    dense_.begin_backward();
    check(call.x, "d_out", call.d_out);
    check(call.x, "d_x", call.d_x);
    dense_.check_gradients(call.gradients);
    const std::int64_t tokens = call.x.shape[0];
    if (step == nullptr || step->num_tokens != tokens) {
      usage_error("saved is of {} tokens and x is {}; pass what forward saved for these rows", step == nullptr ? 0 : step->num_tokens,
                  describe(call.x));
    }
    workspace().order().enter(stream_of(call.stream));
    const ConstTensorView& gate = dense_.gate();
    const TensorView dx = gate ? workspace().shared(call.x.dtype, tokens, dense_.hidden_size()) : call.d_x;
    dense_.backward({call.x, call.d_out, &step->dense, &call.gradients, call.stream}, dx);
    if (gate) {
      layer_cuda::add_gradients({.num_rows = tokens,
                                 .columns = dense_.hidden_size(),
                                 .dtype = call.x.dtype,
                                 .gate_dtype = gate.dtype,
                                 .rows = data_of(dx),
                                 .d_logits = dense_.d_logits(),
                                 .gate = data_of(gate),
                                 .out = data_of(call.d_x),
                                 .out_stride = stride_of(call.d_x)},
                                stream_of(call.stream));
      check_launch("launch of a sum of gradients");
    }
    workspace().order().leave(stream_of(call.stream));
  });
}

}  // namespace

std::shared_ptr<DenseEngine> make_cuda_dense(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights,
                                             const Activation& activation) {
  return std::make_shared<CudaDenseLayer>(std::move(group), weights, activation);
}

}  // namespace tokenyard::layer_internal
