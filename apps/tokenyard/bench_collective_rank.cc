// One rank of bench collective: checks sums against the CPU's and gathered rows against what was sent, then measures with events on
// the stream, from behind a barrier of all GPUs.

#include <cuda_runtime_api.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "bench_collective.h"
#include "bench_gpu.h"
#include "bench_samples.h"
#include "ranks.h"
#include "tokenyard/collective.h"
#include "world/nccl.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;
using Counts = std::vector<std::int64_t>;

// NCCL's own all-gather and reduce-scatter, equal counts, launched from this thread.
class Nccl {
 public:
  // Collective. Null where it is not there, or cannot serve these ranks; `why_not` then says so.
  static std::unique_ptr<Nccl> connect(const World& world, std::string& why_not) {
    const auto library = nccl::library();
    if (!library) why_not = library.error().reason + "; " + library.error().remedy;
    int devices = 0;
    cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    if (devices < world.size()) why_not = "it takes one rank per GPU";
    nccl::UniqueId id = {};
    if (why_not.empty() && world.rank() == 0) (*library)->get_unique_id(&id);
    const auto ids = world.all_gather(std::as_bytes(std::span(&id, 1)));
    if (!why_not.empty()) return nullptr;
    std::memcpy(&id, ids[0].data(), sizeof id);
    std::unique_ptr<Nccl> made(new Nccl(**library));
    nccl::Config config;
    made->check("ncclCommInitRankConfig", (*library)->comm_init_rank_config(&made->comm_, world.size(), id, world.rank(), &config));
    return made;
  }
  ~Nccl() {
    if (comm_ != nullptr) library_.comm_abort(comm_);
  }
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  void all_gather(const std::byte* in, std::byte* out, std::int64_t bytes, cudaStream_t stream) {
    check("ncclAllGather", library_.all_gather(in, out, static_cast<std::size_t>(bytes), nccl::kBytes, comm_, stream));
  }
  void reduce_scatter(const std::byte* in, std::byte* out, std::int64_t elements, Dtype dtype, cudaStream_t stream) {
    check("ncclReduceScatter",
          library_.reduce_scatter(in, out, static_cast<std::size_t>(elements), nccl::type_of(dtype), nccl::kSum, comm_, stream));
  }
  std::string version() const { return nccl::version_text(library_.version); }

 private:
  explicit Nccl(const nccl::Library& library) : library_(library) {}
  void check(const char* what, nccl::Result result) const {
    if (result != nccl::Result::success) throw Error(std::string(what) + ": " + library_.get_error_string(result));
  }
  const nccl::Library& library_;
  nccl::Comm comm_ = nullptr;
};

DeviceCollectiveOptions options_of(const CollectiveSettings& settings, int device) {
  return {.device_index = device,
          .transport = Transport::cuda_peer,
          .staging_bytes = settings.staging_bytes,
          .sm_budget = settings.sm_budget,
          .timeout_ms = settings.timeout_ms};
}
DeviceCollectiveOptions barrier_options(const CollectiveSettings& settings, int device) {
  return {
      .device_index = device, .transport = Transport::cuda_peer, .staging_bytes = 4096, .sm_budget = 1, .timeout_ms = settings.timeout_ms};
}

class CollectiveRank {
 public:
  CollectiveRank(const World& world, const CollectiveSettings& settings, Progress& progress)
      : world_(world),
        settings_(settings),
        progress_(progress),
        device_(device_of(world)),
        dtype_(parse_dtype(settings.dtype)),
        row_bytes_(settings.hidden_size * size_of(dtype_)),
        stream_(value_or_throw(make_cuda_stream())),
        gate_(stream_.get()),
        begin_(timed_event()),
        end_(timed_event()) {
    for (int rank = 0; rank < world.size(); ++rank) counts_.push_back(settings.rows_of(rank));
    for (const std::int64_t count : counts_) total_ += count;
    mine_ = counts_[world.rank()];
    const auto most = static_cast<std::size_t>(total_ * row_bytes_);
    terms_ = value_or_throw(make_device_buffer(device_, most));
    gathered_ = value_or_throw(make_device_buffer(device_, most));
    sums_ = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(mine_ * row_bytes_)));
    if (settings.uneven)
      no_nccl_ = "counts differ";
    else
      nccl_ = Nccl::connect(world, no_nccl_);
    barrier_ = DeviceCollectives::create(world, barrier_options(settings, device_));
    direct_ = DeviceCollectives::create(world, options_of(settings, device_));
  }

  json run() {
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(settings_.warmup + settings_.iterations);
    check();
    for (int i = 0; i < settings_.warmup + settings_.iterations; ++i) {
      if (i == settings_.warmup) samples_.clear();
      iterate();
      if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
    }
    return report();
  }

 private:
  TensorView view(std::byte* data, std::int64_t rows) const { return {data, dtype_, {rows, settings_.hidden_size}}; }

  void gather() { direct_->all_gather_v(view(terms_.data(), mine_), counts_, view(gathered_.data(), total_), stream_.get()); }
  void reduce() { direct_->reduce_scatter_v(view(terms_.data(), total_), counts_, view(sums_.data(), mine_), stream_.get()); }

  void call_nccl_gather() { nccl_->all_gather(terms_.data(), gathered_.data(), mine_ * row_bytes_, stream_.get()); }
  void call_nccl_reduce() { nccl_->reduce_scatter(terms_.data(), sums_.data(), mine_ * settings_.hidden_size, dtype_, stream_.get()); }

  // Elements in [1, 2), which are finite in every type and round when they are added.
  std::vector<std::byte> elements(int rank) const {
    std::mt19937 random(static_cast<unsigned>(rank + 1));
    std::vector<std::byte> bytes(static_cast<std::size_t>(total_ * row_bytes_));
    const auto count = static_cast<std::int64_t>(bytes.size()) / size_of(dtype_);
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = 1.0F + static_cast<float>(random() >> 9) * 0x1p-23F;
      const std::uint16_t half = dtype_ == Dtype::float16 ? float_to_float16(value) : float_to_bfloat16(value);
      std::memcpy(bytes.data() + i * size_of(dtype_), size_of(dtype_) == 4 ? static_cast<const void*>(&value) : &half, size_of(dtype_));
    }
    return bytes;
  }

  std::vector<std::byte> fetched(const DeviceBuffer& from) {
    direct_->wait(stream_.get());
    std::vector<std::byte> bytes(from.bytes());
    cuda_check(cudaMemcpy(bytes.data(), from.data(), bytes.size(), cudaMemcpyDeviceToHost), "copying results to the host");
    return bytes;
  }

  // NCCL connects ranks when they first talk, and then waits for what is on its way: not behind a gate.
  void connect() {
    if (!nccl_) return;
    call_nccl_gather();
    call_nccl_reduce();
    direct_->wait(stream_.get());
  }

  // Against the same call on the CPU.
  void check() {
    connect();
    std::vector<std::byte> in = elements(world_.rank());
    cuda_check(cudaMemcpy(terms_.data(), in.data(), in.size(), cudaMemcpyHostToDevice), "copying rows to the GPU");
    world_.barrier();
    const auto cpu = Collectives::create(world_);
    std::vector<std::byte> sums(sums_.bytes()), all(gathered_.bytes());
    cpu->reduce_scatter_v(view(in.data(), total_), counts_, view(sums.data(), mine_));
    cpu->all_gather_v(view(in.data(), mine_), counts_, view(all.data(), total_));
    reduce();
    const bool sums_are_right = fetched(sums_) == sums;
    gather();
    const bool rows_are_right = fetched(gathered_) == all;
    for (const json& right : tokenyard::cli::gather(world_, json::array({rows_are_right, sums_are_right}))) {
      if (!right[0]) throw Error("all_gather_v brings other rows than the CPU's");
      if (!right[1]) throw Error("reduce_scatter_v brings other sums than the CPU's");
    }
  }

  template <class Body>
  void time(const char* series, Body&& body) {
    cuda_check(cudaStreamSynchronize(stream_.get()), "between measurements");
    world_.barrier();
    gate_.close();
    const AllToAllRows nothing{{nullptr, Dtype::uint8, {0, 16}}, none_, {nullptr, Dtype::uint8, {0, 16}}, none_};
    barrier_->all_to_all_v(std::span(&nothing, 1), stream_.get());
    cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
    body();
    cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
    gate_.open();
    direct_->wait(stream_.get());
    float milliseconds = 0;
    cuda_check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
    samples_[series].push_back(1e3 * milliseconds);
  }

  void iterate() {
    time("all_gather_v", [&] { gather(); });
    time("reduce_scatter_v", [&] { reduce(); });
    if (!nccl_) return;
    time("nccl_all_gather_v", [&] { call_nccl_gather(); });
    time("nccl_reduce_scatter_v", [&] { call_nccl_reduce(); });
  }

  json report() {
    std::int64_t most = 0;
    for (const std::int64_t count : counts_) most = std::max(most, count);
    json result = summarise(tokenyard::cli::gather(world_, {{"samples", samples_}, {"sent", SentRows()}}));
    cudaDeviceProp properties{};
    cuda_check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
    result["gpu"] = {{"name", properties.name}, {"runtime_cuda", CUDART_VERSION}};
    result["transport"] = name(direct_->transport());
    result["bytes"] = (world_.size() - 1) * most * row_bytes_;
    if (nccl_)
      result["nccl"] = nccl_->version();
    else
      result["no_nccl"] = no_nccl_;
    return result;
  }

  const World& world_;
  const CollectiveSettings settings_;
  Progress& progress_;
  const int device_;
  const Dtype dtype_;
  const std::int64_t row_bytes_;
  CudaStream stream_;
  StreamGate gate_;
  TimedEvent begin_, end_;
  Counts counts_;
  Counts none_ = Counts(static_cast<std::size_t>(world_.size()), 0);
  std::int64_t total_ = 0, mine_ = 0;
  DeviceBuffer terms_, gathered_, sums_;
  std::string no_nccl_;
  std::unique_ptr<Nccl> nccl_;
  std::unique_ptr<DeviceCollectives> barrier_, direct_;
  Samples samples_;
};

}  // namespace

json bench_collective_role(const World& world, const json& settings, Progress& progress) {
  return CollectiveRank(world, collective_settings_from_json(settings), progress).run();
}

}  // namespace tokenyard::cli
