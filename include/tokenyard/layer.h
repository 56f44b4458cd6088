#pragma once
// The MoE feed-forward of a model, on ranks: gate, routing, dispatch, experts, combine, shared expert; forward and backward. What all
// layers of a model share, the ranks, one exchange and the collectives, is an ExpertGroup. The guide is docs/expert_tp.md.
//
// T tokens of this rank (each rank its own number, also 0), H hidden_size, E experts, K top_k, L local experts, I expert_width of this
// rank's shard, g ranks of a tensor-parallel group. Rows are float32, bfloat16 or float16; weights any of the three, each for itself, and
// experts also float8_e4m3, forward only (ExpertWeights). With ExpertGroupOptions::device = cuda, MoeLayer is on GPUs: all tensors are in
// device memory, rows and the weights of experts of one type (with float8 experts rows are of the group's dtype, bfloat16 or float16); a
// step is enqueued on a stream and never waits for the device, and can be captured in a graph.
// All calls are collective: the ranks of the group make them in the same order. UsageError names the tensor that does not fit, and peers in
// the same step fail with TransportError(aborted) and that reason; the next step is fine. (On GPUs, with gathered experts and ep > 1, a
// rank that shares neither exchange nor shards with the one that refused is not told, and what it gets of that step is worthless.) Other
// TransportErrors as in exchange.h and collective.h.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tokenyard/collective.h"
#include "tokenyard/exchange.h"
#include "tokenyard/experts.h"
#include "tokenyard/parallel.h"
#include "tokenyard/routing.h"

namespace tokenyard {

namespace layer_internal {
class DenseEngine;
class DeviceWorkspace;
struct DenseStep;
struct MoeStep;
class MoeEngine;
}  // namespace layer_internal

// Two exact ways to divide an expert over mlp_tp ranks. Same answer, other rounding: `virtual_experts` sums all partials at once,
// `gathered` first those of a window, and rounds that sum to the rows' type. With ep = 1 there is no exchange, and both are `gathered`.
enum class ExpertTp : std::uint8_t {
  virtual_experts,  // one exchange over all ep * mlp_tp ranks: a row goes to every shard of its experts
  gathered,         // an exchange over ep ranks; received rows are gathered over the shards of a window, partials reduce-scattered
};
std::string_view name(ExpertTp expert_tp);        // "virtual", "gathered"
ExpertTp parse_expert_tp(std::string_view text);  // UsageError for anything else

// The same on all ranks.
struct ExpertGroupOptions {
  int num_experts = 0;                   // of the fullest layer
  int top_k = 0;                         // most experts per token
  std::int64_t hidden_size = 0;          // of the widest layer
  Dtype dtype = Dtype::float32;          // the widest type of rows; cuda: that of rows for float8 experts
  std::int64_t max_tokens_per_rank = 0;  // most tokens of a step
  ExpertTp expert_tp = ExpertTp::virtual_experts;
  bool same_tokens = false;       // ep = 1 and mlp_tp > 1: all ranks have the same tokens (else each its own)
  int dense_tp = 1;               // ranks that share a DenseLayer or a shared expert: consecutive ones; divides ep * mlp_tp
  int max_local_experts = 0;      // experts on the fullest rank, over all placements; 0: ceil(num_experts / ep), as even windows need
  std::int64_t receive_rows = 0;  // as in ExchangeOptions
  int depth = 2;                  // as in ExchangeOptions
  int num_threads = 1;            // as in ExchangeOptions
  bool trace = false;             // keep spans, see take_spans()
  Transport transport = Transport::automatic;
  int timeout_ms = 0;           // deadline of every wait; 0: the world's
  Device device = Device::cpu;  // where rows and weights are
  int device_index = -1;        // cuda: as in ExchangeOptions
  int sm_budget = 0;            // cuda: as in ExchangeOptions
  bool gradients = false;       // cuda: layers go backward, too, and hold memory for it
  // cuda, with an exchange: most rows of a rank's experts in a step; 0: receive_rows x min(top_k, max_local_experts). gathered with
  // mlp_tp > 1: 0, or at least mlp_tp x receive_rows x top_k.
  std::int64_t max_expert_rows = 0;
};

// The ranks that hold all experts together (ep * mlp_tp; one of outer_dp such groups), and what they meet with. One serves all layers.
class ExpertGroup {
 public:
  // `world` has the config's device_count ranks. UsageError for sizes that do not fit each other.
  ExpertGroup(const World& world, const ParallelConfig& config, const ExpertGroupOptions& options);
  ~ExpertGroup();

  const ExpertGroupOptions& options() const { return options_; }  // with defaults filled in
  const ParallelConfig& config() const { return config_; }
  const World& world() const { return *world_; }  // of this group: rank = ep * mlp_tp + shard
  int ep_rank() const { return world_->rank() / config_.mlp_tp; }
  int tp_rank() const { return world_->rank() % config_.mlp_tp; }
  int dense_rank() const { return world_->rank() % options_.dense_tp; }
  // nullptr with ep = 1: a model without expert parallelism has none.
  Exchange* exchange() { return exchange_.get(); }
  // Over the shards of this rank's window of experts; nullptr where nothing is gathered (virtual experts with ep > 1, mlp_tp = 1). On
  // CPUs, and on GPUs.
  Collectives* tp() { return tp_.get(); }
  DeviceCollectives* tp_on_gpus() { return tp_on_gpus_.get(); }
  // Over the ranks that share dense weights; nullptr with dense_tp = 1. On CPUs, and on GPUs.
  Collectives* dense() { return dense_.get(); }
  DeviceCollectives* dense_on_gpus() { return dense_on_gpus_.get(); }
  // Where experts are unless a layer says otherwise, over world(): what expert_shard() of weights.h takes.
  Placement placement(int num_experts) const;
  // Registers a layer's placement over the exchange's ranks once, and returns its number.
  int add(const Placement& placement);
  // Of layers, since the last call: "route", "dispatch", "shared", "experts", "combine". Empty without options.trace.
  // On cuda "gate" is a phase of its own, as are "gather" and "reduce" of shards; this waits for the phases that are enqueued.
  std::vector<PhaseSpan> take_spans();
  // Throws what is known of steps that were only enqueued on a GPU; waits for nothing.
  void check();
  void note(PhaseSpan span);
  // cuda; nullptr on CPUs.
  const std::shared_ptr<layer_internal::DeviceWorkspace>& workspace() const { return workspace_; }

 private:
  void make_workspace();
  ExpertGroupOptions options_;
  ParallelConfig config_;
  std::optional<World> world_;
  std::unique_ptr<Collectives> tp_, dense_;
  std::unique_ptr<DeviceCollectives> tp_on_gpus_, dense_on_gpus_;
  std::unique_ptr<Exchange> exchange_;
  std::shared_ptr<layer_internal::DeviceWorkspace> workspace_;
  std::vector<std::uint64_t> added_;  // hashes of placements, by number
  std::vector<PhaseSpan> spans_;
};

struct GateWeights {
  ConstTensorView weight{};          // [E,H]: logits = x weight^T, in float32
  ConstTensorView logit_bias{};      // [E], optional: added to the logits (gpt-oss)
  ConstTensorView selection_bias{};  // [E] float32: of Gate::bias_corrected, and only there
};
// A feed-forward of all tokens: a dense layer, or the shared expert. ExpertWeights of one expert (L = 1); with dense_tp, the shard
// that expert_shard(tensor, {.num_experts = 1, ...}, Placement::tensor_parallel(1, 1, dense_tp), dense_rank) describes.
struct DenseWeights {
  ExpertWeights weights{};
  ConstTensorView gate{};  // [1,H], optional: each row is multiplied by sigmoid(<x, gate>)
};
// Views: the caller keeps them alive, and may change the values between steps.
struct MoeWeights {
  GateWeights gate{};
  ExpertWeights experts{};  // this rank's shard; w2_bias on shard 0 alone (zeros, or none, elsewhere)
  DenseWeights shared{};    // optional
};
// float32, dense, added to; each may be absent. Of weights that several ranks hold (gate, whole shared expert, replicas) this is the share
// of this rank's tokens: their sum over the ranks is the gradient.
struct DenseGradients {
  ExpertGradients weights{};
  TensorView gate{};
};
struct MoeGradients {
  TensorView gate_weight{}, gate_bias{};
  ExpertGradients experts{};
  DenseGradients shared{};
};

// What a forward leaves for its backward. One per micro-batch that is under way; used again it keeps its memory.
class DenseActivations {
 public:
  DenseActivations();
  ~DenseActivations();
  DenseActivations(DenseActivations&&) noexcept;
  DenseActivations& operator=(DenseActivations&&) noexcept;
  layer_internal::DenseStep& step() const { return *step_; }

 private:
  std::unique_ptr<layer_internal::DenseStep> step_;
};
class MoeActivations {
 public:
  MoeActivations();
  ~MoeActivations();
  MoeActivations(MoeActivations&&) noexcept;
  MoeActivations& operator=(MoeActivations&&) noexcept;
  const Routing& routing() const;    // UsageError on cuda
  ConstTensorView logits() const;    // [T,E] float32: what losses of routing.h take; on cuda in device memory
  const Received& received() const;  // rows and who sent them; without an exchange empty
  layer_internal::MoeStep& step() const { return *step_; }

 private:
  std::unique_ptr<layer_internal::MoeStep> step_;
};

// The feed-forward of a model's dense layers: whole weights on every rank, or cut over dense_tp ranks (rows are gathered before, partial
// sums reduce-scattered after). `group` may be nullptr without dense_tp, on CPUs. On GPUs it is as with MoeLayer: rows and weights (but
// for the gate) of one dtype, of max_tokens_per_rank and hidden_size at most, and a stream.
class DenseLayer {
 public:
  DenseLayer(std::shared_ptr<ExpertGroup> group, const DenseWeights& weights, const Activation& activation = {});
  // x, out [T,H] of one dtype; out may be x unless `saved` is given.
  void forward(const ConstTensorView& x, const TensorView& out, DenseActivations* saved = nullptr, void* stream = nullptr);
  // x as given to forward; d_out, d_x [T,H].
  void backward(const ConstTensorView& x, const ConstTensorView& d_out, const DenseActivations& saved, const TensorView& d_x,
                const DenseGradients& gradients, void* stream = nullptr);
  // UsageError for gradients that backward would refuse.
  void check_gradients(const DenseGradients& gradients) const;

 private:
  // As MoeLayer, tells the ranks that share the weights when this one refuses its arguments.
  template <class Check>
  void checked(Check&& check);
  std::shared_ptr<ExpertGroup> group_;
  DenseWeights weights_;
  Activation activation_;
  DenseActivations scratch_;
  std::shared_ptr<layer_internal::DenseEngine> on_gpu_;  // instead of all of this
};

struct MoeLayerOptions {
  Gate gate{};
  Activation activation{};               // of experts and shared expert
  std::optional<Placement> placement{};  // over the exchange's ranks: ep * mlp_tp (virtual) or ep (gathered); default: even windows
};

// Latency mode for steps in which no rank has more tokens than `latency_tokens`. Every rank must give the same maximum, which the
// engine's scheduler knows.
Mode mode_for_step(std::int64_t max_tokens_of_a_rank, std::int64_t latency_tokens = 128);

struct MoeStepOptions {
  Mode mode = Mode::throughput;  // the same on all ranks
  ConstTensorView mask{};        // [T] uint8, optional: 0 for tokens that no expert sees
  ConstTensorView given_ids{};   // [T,K] int64 or int32, optional: replay; weights by the gate's rule
  // With same_tokens: out and d_out are this rank's slice of the tokens (slice_counts() of norm.h), which the layer then need not gather.
  bool sliced_out = false;
  TensorView logits{};     // [T,E] float32, dense, optional: where the gate's logits are left; route() makes the step's routing of them
  void* stream = nullptr;  // cuda: the cudaStream_t that made the input, and on which out becomes valid
};

struct MoeBackwardInput {
  ConstTensorView x{};         // as given to forward
  ConstTensorView d_out{};     // as out of forward
  ConstTensorView d_logits{};  // [T,E] float32, optional: of losses on the logits; added to what comes through the weights
  MoeStepOptions options{};    // as given to forward
};

class MoeLayer {
 public:
  // Collective: placements are registered in the order of layers.
  MoeLayer(std::shared_ptr<ExpertGroup> group, const MoeWeights& weights, const MoeLayerOptions& options);
  ~MoeLayer();
  MoeLayer(MoeLayer&&) noexcept;
  MoeLayer& operator=(MoeLayer&&) noexcept;

  // x [T,H] -> out [T,H], of one dtype: the weighted sum over each token's experts, plus the shared expert's row. x stays as it is,
  // and out may be x unless `saved` is given.
  void forward(const ConstTensorView& x, const TensorView& out, const MoeStepOptions& options = {}, MoeActivations* saved = nullptr);
  // d_x [T,H]; through rows, routing weights and shared expert. The choice of experts is a constant.
  void backward(const MoeBackwardInput& input, const MoeActivations& saved, const TensorView& d_x, const MoeGradients& gradients);
  // Runs steps of these numbers of tokens per rank, in each mode that takes them, with balanced routing: memory and products of those
  // sizes are there before the first request. The same counts on all ranks.
  void warm_up(std::span<const std::int64_t> token_counts);

 private:
  std::unique_ptr<layer_internal::MoeEngine> engine_;
};

}  // namespace tokenyard
