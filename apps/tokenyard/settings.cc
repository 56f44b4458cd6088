#include "settings.h"

#include <fmt/core.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "channel.h"
#include "core/usage.h"
#include "files.h"
#include "table.h"
#include "tokenyard/topo.h"

namespace tokenyard::cli {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Settings, ranks, tokens, hidden_size, experts, top_k, dtype, mode, layout, sizing,
                                                gather_map, placement, preset, transport, device, sm_budget, skew, threads, depth,
                                                iterations, warmup, seed, timeout_ms, baseline, trace)

namespace {

constexpr int kMaxTopK = 64;
constexpr int kMaxExperts = 4096;  // of a gate
constexpr std::int64_t kMaxTokens = 1 << 24;
constexpr std::int64_t kMaxHiddenSize = 1 << 24;

void require_range(const char* option, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) usage_error("{} {}: out of range; give a number from {} to {}", option, value, low, high);
}

std::int64_t largest_row_bytes(const Settings& settings) {
  const Dtype dtype = parse_dtype(settings.dtype);
  return settings.hidden_size * size_of(is_summable(dtype) ? dtype : Dtype::bfloat16);
}

void check_rows(Settings& settings) {
  const Dtype dtype = parse_dtype(settings.dtype);
  if (!is_summable(dtype) && dtype != Dtype::float8_e4m3) {
    usage_error("--dtype {}: rows are sums' input; use float64, float32, bfloat16, float16 or float8_e4m3", settings.dtype);
  }
  settings.dtype = name(dtype);
  const std::int64_t row_bytes = settings.hidden_size * size_of(dtype);
  if (row_bytes % 16 != 0) {
    const std::int64_t unit = 16 / size_of(dtype);
    const std::int64_t below = settings.hidden_size / unit * unit;
    usage_error("--hidden-size {}: a row of {} {} has {} bytes, which is no multiple of 16; use --hidden-size {}", settings.hidden_size,
                settings.hidden_size, settings.dtype, row_bytes,
                below > 0 ? fmt::format("{} or {}", below, below + unit) : std::to_string(unit));
  }
}

void check_mode(Settings& settings) {
  const Mode mode = parse_mode(settings.mode);
  const bool latency = mode == Mode::latency;
  if (settings.layout.empty()) settings.layout = name(latency ? Layout::rank_slots : Layout::token_major);
  if (settings.sizing.empty()) settings.sizing = name(latency || settings.device == "cuda" ? Sizing::capacity : Sizing::exact);
  const Layout layout = parse_layout(settings.layout);
  if (parse_sizing(settings.sizing) == Sizing::exact && latency) {
    usage_error("--sizing exact with --mode latency: latency mode has fixed slots and never waits for counts; use --sizing capacity");
  }
  if (layout == Layout::rank_slots && !latency) {
    usage_error("--layout rank_slots with --mode throughput: slots exist in latency mode only; use --mode latency or --layout token_major");
  }
}

void apply_preset(CLI::App& app, Settings& settings) {
  if (settings.preset.empty()) return;
  const ModelPreset& preset = model_preset(settings.preset);
  for (const char* option : {"--experts", "--top-k"}) {
    if (app.count(option) > 0) usage_error("{} with --preset {}: the preset says it; leave one of the two out", option, settings.preset);
  }
  settings.experts = preset.num_experts;
  settings.top_k = preset.top_k;
  if (app.count("--hidden-size") == 0) settings.hidden_size = preset.hidden_size;
}

int parse_count(const std::string& placement, std::size_t at) {
  int count = -1;
  const char* end = placement.data() + placement.size();
  const auto [stopped, error] = std::from_chars(placement.data() + at, end, count);
  if (error != std::errc() || stopped != end || count < 0) {
    usage_error("--placement {}: \"{}\" is no count; use for example tp:2 or replicated:8", placement, placement.substr(at));
  }
  return count;
}

Placement tensor_parallel_of(const Settings& settings) {
  const int tp = parse_count(settings.placement, 3);
  if (tp < 1 || settings.ranks % tp != 0) {
    usage_error("--placement tp:{} with --ranks {}: {} ranks cannot be cut into groups of {}; use a divisor of --ranks", tp, settings.ranks,
                settings.ranks, tp);
  }
  return Placement::tensor_parallel(settings.experts, settings.ranks / tp, tp);
}

Placement placement_from_file(const Settings& settings) {
  const std::string& path = settings.placement;
  if (!path.ends_with(".json")) {
    usage_error("--placement {}: unknown; use uniform, tp:N, replicated:N or the path of a .json file", path);
  }
  const std::string text = read_file("--placement", path);
  try {
    Placement placement = Placement::from_json(text);
    if (placement.ranks() == settings.ranks && placement.num_experts() == settings.experts) return placement;
    usage_error("has {} ranks and {} experts, the run {} and {}; use --ranks {} --experts {}", placement.ranks(), placement.num_experts(),
                settings.ranks, settings.experts, placement.ranks(), placement.num_experts());
  } catch (const UsageError& wrong) {
    usage_error("--placement {}: {}", path, wrong.what());
  }
}

// MPI as the library sees it.
Backend mpi_backend() {
  for (const Backend& backend : backends()) {
    if (backend.name == "mpi") return backend;
  }
  return {"mpi", "collective", Availability::not_built, "this build has no MPI", "configure with -DTY_MPI=ON"};
}

std::string why_no_mpi() {
  const Backend mpi = mpi_backend();
  // not_usable: the library is asked in this process, which mpirun did not start; the ranks will be.
  if (mpi.availability == Availability::not_built) return fmt::format("{}; {}", mpi.reason, mpi.remedy);
  if (find_mpirun().empty()) return "mpirun is not in PATH; install OpenMPI (apt-get install openmpi-bin)";
  return {};
}

std::string why_no_nccl(const Settings& settings) {
  for (const Backend& backend : backends()) {
    if (backend.name == "nccl" && backend.availability != Availability::available)
      return fmt::format("{}; {}", backend.reason, backend.remedy);
  }
  const std::size_t gpus = gpu_topology().gpus.size();
  if (static_cast<std::size_t>(settings.ranks) <= gpus) return {};
  return fmt::format("{} ranks share {} GPU(s), and NCCL takes one rank per GPU; use --ranks {}", settings.ranks, gpus, gpus);
}

// Rows of one rank's experts: the bound where the layout allocates it, else what even routing gives.
std::int64_t expert_rows_of(const Settings& settings, const Placement& placement) {
  const std::int64_t bound = settings.ranks * settings.tokens;
  switch (parse_layout(settings.layout)) {
    case Layout::expert_padded:
      return bound * placement.max_local_experts();
    case Layout::expert_major:
      return std::max(bound, settings.tokens * settings.top_k * placement.max_fanout());
    default:
      return bound;
  }
}

// The exchange itself, and what the benchmark holds beside it: input sets of each system, expert rows, the two sides of the memcpy.
void check_memory(const Settings& settings) {
  const Placement placement = placement_of(settings);
  const std::int64_t exchange = Exchange::memory_plan(exchange_options(settings, placement), settings.ranks).total();
  const std::int64_t input = settings.tokens * largest_row_bytes(settings);
  const std::int64_t beside =
      (kSystems * kInputSets + 2 * settings.ranks) * input + expert_rows_of(settings, placement) * largest_row_bytes(settings);
  const std::int64_t available = static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
  if (exchange + beside <= available / settings.ranks) return;
  usage_error(
      "--tokens {}: {} ranks x ({} for the exchange + {} for rows in and out) exceed this machine's {}; "
      "use fewer --tokens, fewer --ranks or a smaller --hidden-size",
      settings.tokens, settings.ranks, bytes_text(exchange), bytes_text(beside), bytes_text(available));
}

}  // namespace

void add_shape_options(CLI::App& app, Settings& settings) {
  app.add_option("--ranks", settings.ranks, "Number of ranks")->capture_default_str();
  app.add_option("--tokens", settings.tokens, "Tokens per rank")->capture_default_str();
  app.add_option("--hidden-size", settings.hidden_size, "Elements of a row")->capture_default_str();
  app.add_option("--experts", settings.experts, "Number of experts")->capture_default_str();
  app.add_option("--top-k", settings.top_k, "Experts per token")->capture_default_str();
  app.add_option("--dtype", settings.dtype, "float64, float32, bf16, fp16, fp8 (with scales; combine in bf16)")->capture_default_str();
  app.add_option("--layout", settings.layout, "token_major, expert_major, expert_padded, rank_slots");
  app.add_option("--mode", settings.mode, "throughput or latency")->capture_default_str();
  app.add_option("--sizing", settings.sizing, "exact or capacity");
  app.add_flag("--gather-map", settings.gather_map, "token_major: also the rows of each local expert, as a grouped GEMM takes them");
  app.add_option("--placement", settings.placement, "uniform, tp:N, replicated:N or FILE.json")->capture_default_str();
  app.add_option("--preset", settings.preset, "A model's experts, top-k, hidden size and gate, e.g. deepseek-v3");
  app.add_option("--depth", settings.depth, "Receive buffers")->capture_default_str();
  app.add_option("--skew", settings.skew, "Zipf exponent of the experts' popularity; 0: uniform")->capture_default_str();
}

void add_run_options(CLI::App& app, Settings& settings) {
  app.add_option("--transport", settings.transport,
                 "auto, inproc (rank threads), shm (processes), mpi; with --device cuda: auto, inproc (rank threads), nccl_window")
      ->capture_default_str();
  app.add_option("--device", settings.device, "cpu or cuda: where rows are; on cuda rank r uses GPU r, modulo their number")
      ->capture_default_str();
  app.add_option("--sm-budget", settings.sm_budget, "cuda: multiprocessors that kernels waiting for peers may take; 0: the usual")
      ->capture_default_str();
  app.add_option("--iterations", settings.iterations, "Timed iterations")->capture_default_str();
  app.add_option("--warmup", settings.warmup, "Iterations before them")->capture_default_str();
  app.add_option("--threads", settings.threads, "Threads per rank that move rows")->capture_default_str();
  app.add_option("--seed", settings.seed, "Seed of rows and routing")->capture_default_str();
  app.add_option("--timeout-ms", settings.timeout_ms, "Deadline of every wait")->capture_default_str();
  app.add_flag("!--no-baseline", settings.baseline, "Do not measure the collective exchange over MPI, on cuda over NCCL");
  app.add_flag("--trace", settings.trace, "Time the phases of each call, too; on cuda this adds a few us to each");
}

void complete_shape(CLI::App& app, Settings& settings) {
  require_range("--ranks", settings.ranks, 1, 65535);
  require_range("--tokens", settings.tokens, 1, kMaxTokens);
  require_range("--hidden-size", settings.hidden_size, 1, kMaxHiddenSize);
  require_range("--experts", settings.experts, 1, kMaxExperts);
  require_range("--top-k", settings.top_k, 1, kMaxTopK);
  require_range("--depth", settings.depth, 1, 64);
  if (!std::isfinite(settings.skew) || settings.skew < 0 || settings.skew > 10) {
    usage_error("--skew {}: a Zipf exponent is from 0 (uniform) to 10; 1 is strongly skewed already", settings.skew);
  }
  apply_preset(app, settings);
  if (settings.top_k > settings.experts) {
    usage_error("--top-k {} with --experts {}: a token cannot choose more experts than there are; use --top-k {} or --experts {}",
                settings.top_k, settings.experts, settings.experts, settings.top_k);
  }
  check_rows(settings);
  check_mode(settings);
  placement_of(settings);
}

void complete_run(Settings& settings) {
  require_range("--ranks", settings.ranks, 1, Channel::kMaxRanks);
  require_range("--iterations", settings.iterations, 1, 1'000'000);
  require_range("--warmup", settings.warmup, 0, 1'000'000);
  require_range("--threads", settings.threads, 1, 256);
  require_range("--timeout-ms", settings.timeout_ms, 1, 86'400'000);
  const Transport transport = parse_transport(settings.transport);
  settings.transport = name(transport);
  settings.device = name(parse_device(settings.device));
  require_range("--sm-budget", settings.sm_budget, 0, 1024);
  if (settings.device == "cuda") return;  // its memory is the GPU's, which says itself when it is full
  if (transport == Transport::mpi) {
    const std::string reason = why_no_mpi();
    if (!reason.empty()) usage_error("--transport mpi: {}, or use --transport shm", reason);
  }
  check_memory(settings);
}

nlohmann::json to_json(const Settings& settings) { return settings; }
Settings settings_from_json(const nlohmann::json& settings) { return settings.get<Settings>(); }

Workload workload_of(const Settings& settings, int input_set) {
  Workload workload;
  workload.seed = static_cast<std::uint64_t>(settings.seed) * 1000 + static_cast<std::uint64_t>(input_set);
  workload.popularity_seed = static_cast<std::uint64_t>(settings.seed);
  workload.tokens.assign(static_cast<std::size_t>(settings.ranks), settings.tokens);
  workload.hidden_size = settings.hidden_size;
  workload.dtype = parse_dtype(settings.dtype);
  workload.num_experts = settings.experts;
  workload.gate = settings.preset.empty() ? Gate::softmax(settings.top_k, true) : model_preset(settings.preset).gate;
  workload.skew = settings.skew;
  return workload;
}

Placement placement_of(const Settings& settings) {
  if (settings.placement == "uniform") return Placement::uniform(settings.experts, settings.ranks);
  if (settings.placement.starts_with("tp:")) return tensor_parallel_of(settings);
  if (settings.placement.starts_with("replicated:")) {
    const int redundant = parse_count(settings.placement, std::string("replicated:").size());
    const std::vector<double> load = popularity(settings.experts, settings.skew, workload_of(settings, 0).popularity_seed);
    return Placement::replicated(settings.experts, settings.ranks, load, redundant);
  }
  return placement_from_file(settings);
}

ExchangeOptions exchange_options(const Settings& settings, const Placement& placement) {
  const Workload workload = workload_of(settings, 0);
  ExchangeOptions options;
  options.max_tokens_per_rank = settings.tokens;
  options.max_row_bytes = largest_row_bytes(settings);
  options.max_scale_bytes = workload.scale_columns() * size_of(Dtype::float32);
  options.top_k = settings.top_k;
  options.max_local_experts = std::max(1, placement.max_local_experts());
  options.max_fanout = placement.max_fanout();
  options.depth = settings.depth;
  options.expert_rows = has_expert_rows(parse_layout(settings.layout));
  options.mode = parse_mode(settings.mode);
  options.transport = parse_transport(settings.transport);
  options.num_threads = settings.threads;
  options.sm_budget = settings.sm_budget;
  options.timeout_ms = settings.timeout_ms;
  options.trace = settings.trace;
  return options;
}

DispatchOptions dispatch_options(const Settings& settings) {
  DispatchOptions options;
  options.layout = parse_layout(settings.layout);
  options.sizing = parse_sizing(settings.sizing);
  options.gather_map = settings.gather_map;
  return options;
}

Weighting weighting_of(Layout layout) { return has_expert_rows(layout) ? Weighting::none : Weighting::at_expert; }

bool has_expert_rows(Layout layout) { return layout == Layout::token_major || layout == Layout::rank_slots; }

Runner choose_runner(const Settings& settings, std::string& no_baseline) {
  const Transport transport = parse_transport(settings.transport);
  if (settings.device == "cuda") {
    no_baseline = settings.baseline ? why_no_nccl(settings) : "--no-baseline was given";
    return transport == Transport::inproc ? Runner::threads : Runner::processes;
  }
  if (transport == Transport::mpi) {
    no_baseline = "what is measured is the collective exchange itself";
    return Runner::mpirun;
  }
  if (transport == Transport::inproc) {
    no_baseline = "rank threads are no MPI ranks; use --transport shm";
    return Runner::threads;
  }
  no_baseline = settings.baseline ? why_no_mpi() : "--no-baseline was given";
  return no_baseline.empty() ? Runner::mpirun : Runner::processes;
}

std::string describe(const Settings& settings) {
  return fmt::format("{} ranks x {} tokens x {} {}, top-{} of {} experts ({}{}), {}{}, {}, {}", settings.ranks, settings.tokens,
                     settings.hidden_size, settings.dtype, settings.top_k, settings.experts, settings.placement,
                     settings.skew > 0 ? fmt::format(", skew {}", settings.skew) : "", settings.layout,
                     settings.gather_map ? " with gather map" : "", settings.mode, settings.sizing);
}

}  // namespace tokenyard::cli
