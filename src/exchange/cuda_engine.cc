// What a CUDA engine is made of, and what happens when something fails.

#include "exchange/cuda_engine.h"

#include <algorithm>
#include <cstring>

#include "core/log.h"
#include "core/usage.h"
#include "exchange/memory_plan.h"
#include "exchange/peer_wait.h"
#include "tokenyard/topo.h"

namespace tokenyard::exchange_internal {
namespace {

ExchangeOptions with_device(ExchangeOptions options) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();
    usage_error("device = cuda: CUDA sees no GPU here; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device = cpu");
  }
  if (options.device_index == -1) cuda_check(cudaGetDevice(&options.device_index), "cudaGetDevice");
  if (options.device_index < 0 || options.device_index >= devices)
    usage_error("device_index = {}; CUDA sees {} GPUs here: choose 0 to {}, or -1 for the current one", options.device_index, devices,
                devices - 1);
  if (options.transport == Transport::automatic) options.transport = Transport::cuda_peer;
  if (options.transport != Transport::cuda_peer && options.transport != Transport::nccl_window)
    usage_error("transport = {} with device = cuda; use cuda_peer, nccl_window or automatic", name(options.transport));
  return options;
}

// What the blocks of a few calls may take, in any layout. Ranks that share a GPU reserve it: their kernels wait for each other, and an
// allocation in between may wait for all of them.
std::int64_t block_bytes(const ExchangeOptions& options, const protocol::ArenaShape& shape) {
  constexpr std::int64_t kCalls = 4;
  const std::int64_t row = options.max_row_bytes + options.max_scale_bytes;
  const std::int64_t layout_rows = std::max(expert_major_rows(options), shape.max_local_experts * shape.receive_rows);
  const std::int64_t handle_rows = std::max(layout_rows, shape.receive_rows) + shape.max_tokens_per_rank * shape.ranks;
  constexpr std::int64_t kMetadata = 64;  // bytes of a row beside its top_k ids and weights
  return kCalls * (layout_rows * row + handle_rows * (kMetadata + 12 * shape.top_k) + shape.max_tokens_per_rank * (row + 8 * shape.top_k)) +
         (std::int64_t{32} << 20);
}

// How many ranks of this world share this rank's GPU.
int ranks_on_device(const World& world, int device) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const auto all = world.all_gather(std::as_bytes(std::span(properties.uuid.bytes)));
  return static_cast<int>(std::count(all.begin(), all.end(), all[world.rank()]));
}

}  // namespace

CudaEngine::CudaEngine(const World& world, const ExchangeOptions& options)
    : ExchangeEngine(world, with_device(options)), device_(options_.device_index), trace_(options_.trace) {
  const CudaDeviceScope scope(device_);
  cuda_check(scope.status(), "cudaSetDevice");
  const int sharing = ranks_on_device(world_, device_);
  const int share = std::max(1, multiprocessors_of(device_) / sharing);
  const int usual = usual_sm_budget(options_.mode, world_.size(), options_.max_tokens_per_rank);
  budget_ = take_sm_budget(device_, options_.sm_budget, std::min(usual, share));
  options_.sm_budget = budget_.multiprocessors;
  cuda::preload_kernels();
  blocks_ = std::make_shared<BlockPool>(device_);
  counts_pool_ = std::make_shared<CountsPool>();
  if (sharing > 1) {
    std::size_t free = 0, all = 0;
    cuda_check(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
    blocks_->reserve(std::min(block_bytes(options_, shape_), static_cast<std::int64_t>(free) / (4 * sharing)));
  }
  stream_ = value_or_throw(borrow_cuda_stream());
  entered_ = value_or_throw(make_cuda_event());
  make_scratch();
  arena_ = std::make_unique<DeviceArena>(world_, options_, shape_);
  watch_ = arena_->watch(world_);
  orders_ = std::make_shared<BufferOrders>();
  for (int buffer = 0; buffer < options_.depth; ++buffer) {
    orders_->receive.emplace_back(device_);
    orders_->expert.emplace_back(device_);
  }
  receive_board_ = std::make_shared<LeaseBoard>(options_.depth, [orders = orders_](int buffer) { orders->receive[buffer].give_back(); });
  expert_board_ = std::make_shared<LeaseBoard>(options_.depth, [orders = orders_](int buffer) { orders->expert[buffer].give_back(); });
  expert_memory_.resize(options_.depth);
  world_.barrier();  // nobody waits in a kernel while another rank still allocates
}

CudaEngine::~CudaEngine() {
  const CudaDeviceScope scope(device_);
  // What is enqueued runs to its end: peers count on it. It ends in any case, at the latest at its deadlines.
  try {
    order_.wait();
  } catch (const std::exception& error) {
    log_info("exchange: while it was destroyed: {}", error.what());
  }
}

void CudaEngine::make_scratch() {
  const protocol::DeviceScratch at = protocol::device_scratch(shape_);
  scratch_ = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(at.bytes())));
  auto* const words = reinterpret_cast<std::int32_t*>(scratch_.data());
  row_numbers_ = {.number = words + at.number, .before = words + at.before, .base = words + at.base};
  counts_ = words + at.counts;
  own_counts_ = words + at.own_counts;
  own_places_ = words + at.own_places;
  layout_table_ = {.counts = words + at.layout_counts,
                   .chunk_rows = static_cast<std::int32_t>(protocol::layout_chunk_rows(shape_)),
                   .sums = words + at.layout_sums};
  cuda_check(cudaMemsetAsync(scratch_.data(), 0, scratch_.bytes(), stream_.get()), "clearing scratch memory");
  groups_ = {};
  const bool grouped = std::any_of(options_.reduction_groups.begin(), options_.reduction_groups.end(), [](int group) { return group > 0; });
  if (grouped) {
    const std::size_t bytes = options_.reduction_groups.size() * sizeof(int);
    groups_ = value_or_throw(make_device_buffer(device_, bytes));
    cuda_check(cudaMemcpyAsync(groups_.data(), options_.reduction_groups.data(), bytes, cudaMemcpyDefault, stream_.get()),
               "copying groups");
  }
  cuda_check(cudaStreamSynchronize(stream_.get()), "preparing scratch memory");
}

void CudaEngine::placements_changed() {
  const CudaDeviceScope scope(device_);
  tables_.clear();
  for (const RegisteredPlacement& entry : placements_) {
    const placement_internal::Table& table = entry.placement.table();
    const std::size_t instances = table.instances.size() * 4;
    const std::size_t shares = table.share_ends.size() * 4;
    const std::size_t ordinals = entry.shard_ordinals.size() * 4;
    DeviceTable made{.memory = value_or_throw(make_device_buffer(device_, instances + shares + ordinals)), .view = table.view()};
    std::byte* const at = made.memory.data();
    const char* const what = "copying a placement's table";
    const auto copy = [&](std::byte* to, const void* from, std::size_t bytes) {
      cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()), what);
    };
    copy(at, table.instances.data(), instances);
    copy(at + instances, table.share_ends.data(), shares);
    copy(at + instances + shares, entry.shard_ordinals.data(), ordinals);
    made.view.instances = reinterpret_cast<const std::uint32_t*>(at);
    made.view.share_ends = reinterpret_cast<const std::uint32_t*>(at + instances);
    made.shard_ordinals = reinterpret_cast<const std::int32_t*>(at + instances + shares);
    tables_.push_back(std::move(made));
  }
  cuda_check(cudaStreamSynchronize(stream_.get()), "copying placements");
  world_.barrier();  // nobody waits in a kernel while another rank still allocates
}

void CudaEngine::wait_idle() {
  const CudaDeviceScope scope(device_);
  order_.wait();
}

void CudaEngine::reject(cudaStream_t stream, const std::string& reason) {
  const CudaDeviceScope scope(device_);
  arena_->reject(order_, stream, reason, [&](const char* text, cudaStream_t on) { cuda::launch_reject(arena_->context(), text, on); });
}

cuda::Context CudaEngine::context(const TensorView& waits) const {
  cuda::Context context = arena_->context();
  context.waits = waits.as<unsigned long long>();
  return context;
}

void CudaEngine::abandon(const std::string& reason) {
  const CudaDeviceScope scope(device_);
  check();
  ++last_call_;
  reject(stream_.get(), reason);
}

void CudaEngine::check() const {
  if (const auto record = arena_->take_failure()) throw TransportError(describe_failure(*record));
}

ExchangeStatus CudaEngine::status() const {
  const CudaDeviceScope scope(device_);
  ExchangeStatus status;
  if (const auto record = arena_->lasting_failure()) status.failure = describe_failure(*record);
  const protocol::DeviceState state = arena_->state();
  status.invalid_ids = static_cast<std::int64_t>(state.invalid_ids);
  status.lost_ids = static_cast<std::int64_t>(state.lost_ids);
  return status;
}

std::vector<PhaseSpan> CudaEngine::take_spans() {
  const CudaDeviceScope scope(device_);
  return trace_.take();
}

void CudaEngine::clear() {
  const CudaDeviceScope scope(device_);
  wait_idle();
  const std::uint64_t mine[1] = {arena_->state().call};
  std::uint64_t agreed = 0;
  for (const auto& bytes : world_.all_gather(std::as_bytes(std::span(mine)))) {
    std::uint64_t theirs = 0;
    std::memcpy(&theirs, bytes.data(), sizeof theirs);
    agreed = std::max(agreed, theirs);
  }
  arena_->reset(agreed);
  world_.barrier();  // nobody goes on while another's memory still says that it failed
}

std::vector<int> CudaEngine::recover() {
  const CudaDeviceScope scope(device_);
  wait_idle();
  Survivors left = world_.survivors();
  ExchangeOptions options = options_without_lost(left.ranks);
  options.nccl_communicator = nullptr;  // a given one has the lost ranks
  watch_.reset();
  // New memory, not the old one cleaned: a rank that is only slow may still write into what it knows.
  auto arena = std::make_unique<DeviceArena>(left.world, options, shape_of(options, left.world.size()));
  lost_arenas_.push_back(std::exchange(arena_, std::move(arena)));
  watch_ = arena_->watch(left.world);
  shrink_to(left, options);
  make_scratch();
  world_.barrier();  // nobody waits in a kernel while another rank still allocates
  return std::move(left.ranks);
}

Failure CudaEngine::describe_failure(const protocol::ErrorRecord& record) const {
  Failure failure = arena_->describe(record);
  if (failure.kind == FailureKind::mismatch) failure.detail = describe_mismatch(record);
  if (failure.kind == FailureKind::overflow) {
    failure.detail = fmt::format(
        "rank {} needs {} rows, room is for {}; raise receive_rows, max_expert_rows or expert_capacity, or set "
        "drop, then clear()",
        record.peer, record.seen, record.expected);
  }
  return failure;
}

std::string CudaEngine::describe_mismatch(const protocol::ErrorRecord& record) const {
  if (!(record.mine == record.theirs))
    return fmt::format("rank {} made {}; rank {} made {}", world_.rank(), describe(record.mine), record.peer, describe(record.theirs));
  if (record.peer != world_.rank()) return fmt::format("rank {} has stopped with this failure; its own error tells more", record.peer);
  if (record.expected == cuda::kNotFinite) return fmt::format("topk_weights of token {} has a weight that is not finite", record.seen);
  return fmt::format("topk_ids has the id {} but the placement has {} experts", record.seen, record.expected);
}

std::unique_ptr<ExchangeEngine> make_cuda_engine(const World& world, const ExchangeOptions& options) {
  return std::make_unique<CudaEngine>(world, options);
}

}  // namespace tokenyard::exchange_internal
