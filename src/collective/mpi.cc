#include "collective/mpi.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "collective/call.h"
#include "collective/ordered_sum.h"
#include "core/deadline.h"
#include "core/env.h"
#include "core/usage.h"
#include "memory/doorbell.h"

namespace tokenyard::collective_internal {
namespace {

constexpr int kNoticeTag = 32767;  // the largest tag that every MPI has

bool is_initialised() {
  int yes = 0;
  MPI_Initialized(&yes);
  return yes != 0;
}
bool is_finalised() {
  int yes = 0;
  MPI_Finalized(&yes);
  return yes != 0;
}

// Set by a failure: MPI_Finalize may wait for the peer for ever.
std::atomic<bool> requests_left_behind = false;

void finalise_at_exit() {
  if (!requests_left_behind && !is_finalised()) MPI_Finalize();
}

std::string describe_error(const char* function, int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  return fmt::format("{}: {}", function, text);
}

// A communicator of exactly the world's ranks, numbered as there.
class Communicator {
 public:
  explicit Communicator(const World& world) {
    int mpi_rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
    const auto gathered = world.all_gather(std::as_bytes(std::span(&mpi_rank, 1)));
    std::vector<int> mpi_ranks(world.size());
    for (int peer = 0; peer < world.size(); ++peer) {
      std::memcpy(&mpi_ranks[peer], gathered[peer].data(), sizeof(int));
      for (int other = 0; other < peer; ++other) {
        if (mpi_ranks[other] != mpi_ranks[peer]) continue;
        usage_error("ranks {} and {} of the world are both rank {} of an MPI job; start all ranks by one mpirun", other, peer,
                    mpi_ranks[peer]);
      }
    }
    MPI_Group everybody, group;
    MPI_Comm_group(MPI_COMM_WORLD, &everybody);
    MPI_Group_incl(everybody, world.size(), mpi_ranks.data(), &group);
    const int code = MPI_Comm_create_group(MPI_COMM_WORLD, group, static_cast<int>(world.generation() % kNoticeTag), &comm_);
    MPI_Group_free(&group);
    MPI_Group_free(&everybody);
    if (code != MPI_SUCCESS) {
      throw TransportError({.kind = FailureKind::system,
                            .phase = Phase::collective,
                            .rank = world.rank(),
                            .detail = describe_error("MPI_Comm_create_group", code)});
    }
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  }
  ~Communicator() {
    if (!requests_left_behind && !is_finalised()) MPI_Comm_free(&comm_);
  }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  MPI_Comm get() const { return comm_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

// One row as one MPI element: counts stay within int for 2^31 rows of up to 2 GiB, and strided rows need no packing.
class RowType {
 public:
  RowType() = default;
  ~RowType() { reset(); }
  RowType(const RowType&) = delete;
  RowType& operator=(const RowType&) = delete;

  MPI_Datatype get(std::int64_t row_bytes, std::int64_t stride_bytes) {
    if (type_ != MPI_DATATYPE_NULL && row_bytes == row_bytes_ && stride_bytes == stride_bytes_) return type_;
    reset();
    MPI_Datatype row;
    MPI_Type_contiguous(static_cast<int>(row_bytes), MPI_BYTE, &row);
    MPI_Type_create_resized(row, 0, stride_bytes, &type_);
    MPI_Type_commit(&type_);
    MPI_Type_free(&row);
    row_bytes_ = row_bytes;
    stride_bytes_ = stride_bytes;
    return type_;
  }
  MPI_Datatype last() const { return type_; }

 private:
  void reset() {
    if (type_ != MPI_DATATYPE_NULL && !is_finalised()) MPI_Type_free(&type_);
  }
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
  std::int64_t row_bytes_ = 0;
  std::int64_t stride_bytes_ = 0;
};

// What a rank that gives up tells the others.
struct Notice {
  FailureKind kind;
  int peer;
  char detail[400];
};

// Posts the sends and receives that MPI_Alltoallv and MPI_Allgatherv post, but watches them: those calls cannot give up when a
// peer is gone. (OpenMPI 4.1, 2 and 4 ranks, 64 B to 14 MB per pair: as fast as MPI_Alltoallv, a little faster for small rows.)
class MpiCollectives final : public Collectives {
 public:
  MpiCollectives(const World& world, const CollectiveOptions& options)
      : world_(world),
        rank_(world.rank()),
        ranks_(world.size()),
        timeout_ms_(options.timeout_ms),
        comm_(world),
        call_(rank_, ranks_),
        sum_(rank_, ranks_) {}

  void barrier() override {
    begin([&] { call_.set_barrier(); });
    MPI_Request request;
    check("MPI_Ibarrier", MPI_Ibarrier(comm_.get(), &request));
    requests_.push_back(request);
    expected_.push_back({-1, -1});
    complete();
  }
  void all_gather_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) override {
    begin([&] { call_.set_all_gather(in, counts, out); });
    exchange_rows();
  }
  void all_to_all_v(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                    std::span<const std::int64_t> receive_counts) override {
    begin([&] { call_.set_all_to_all(in, send_counts, out, receive_counts); });
    exchange_rows();
  }
  void reduce_scatter_v(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) override {
    begin([&] { call_.set_reduce_scatter(in, counts, out); });
    reduce_rows();
  }
  void abandon(const Failure& why) override {
    if (!gave_up_) give_up(why);
  }
  void cancel() override { cancelled_.store(true, std::memory_order_relaxed); }
  const World& world() const override { return world_; }
  Transport transport() const override { return Transport::mpi; }

 private:
  // What a request stands for: rows received from the peer, or -1 where nothing is to be compared.
  struct Expected {
    int peer;
    std::int64_t rows;
  };

  template <class Check>
  void begin(Check&& check);
  void check_int_range() const;
  void exchange_rows();
  void reduce_rows();
  void post_receive(void* to, std::int64_t rows, MPI_Datatype type, int peer);
  void post_sends();
  void complete();
  void check_statuses();
  std::optional<Failure> look_at_peers(bool expired) const;
  std::optional<Failure> notice_from(int peer) const;
  void leave_requests();
  void check(const char* function, int code) {
    if (code != MPI_SUCCESS) fail(failure(FailureKind::system, rank_, describe_error(function, code)));
  }
  Failure failure(FailureKind kind, int peer, std::string detail = {}) const {
    return {.kind = kind, .phase = Phase::collective, .rank = rank_, .peer = peer, .epoch = call_number_, .detail = std::move(detail)};
  }
  // Tells all peers; final.
  void give_up(const Failure& why);
  [[noreturn]] void fail(const Failure& why) {
    give_up(why);
    throw TransportError(*gave_up_);
  }
  int tag() const { return static_cast<int>(call_number_ % kNoticeTag); }
  int peer_after(int steps) const { return (rank_ + steps) % ranks_; }
  std::int64_t stride_bytes(const ConstTensorView& view) const {
    return view.shape[0] > 1 ? view.strides[0] * size_of(view.dtype) : call_.row_bytes();
  }

  World world_;
  int rank_;
  int ranks_;
  int timeout_ms_;
  Communicator comm_;
  std::uint64_t call_number_ = 0;
  Call call_;
  RowType send_type_, receive_type_;
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  std::vector<Expected> expected_;
  OrderedSum sum_;
  std::vector<std::byte> partials_;  // of peers, for reduce_scatter_v
  std::atomic<bool> cancelled_{false};
  std::optional<Failure> gave_up_;  // repeated by every later call
};

template <class Check>
void MpiCollectives::begin(Check&& check) {
  if (!gave_up_ && cancelled_.load(std::memory_order_relaxed)) give_up(failure(FailureKind::system, rank_, "cancelled"));
  if (gave_up_) throw TransportError(*gave_up_);
  ++call_number_;
  requests_.clear();
  expected_.clear();
  try {
    check();
    check_int_range();
  } catch (const UsageError& error) {
    give_up(failure(FailureKind::aborted, rank_, error.what()));
    throw;
  }
}

void MpiCollectives::check_int_range() const {
  if (call_.row_bytes() > INT_MAX) usage_error("rows of {} bytes; MPI takes at most {}: cut rows into several", call_.row_bytes(), INT_MAX);
  for (int peer = 0; peer < ranks_; ++peer) {
    const std::int64_t rows = std::max(call_.send(peer).count, call_.receive(peer).count);
    if (rows > INT_MAX) usage_error("{} rows to or from rank {}; MPI takes at most {}: use longer rows", rows, peer, INT_MAX);
  }
}

void MpiCollectives::exchange_rows() {
  const MPI_Datatype type = receive_type_.get(call_.row_bytes(), stride_bytes(call_.out()));
  for (int i = 1; i < ranks_; ++i) {
    const RowSpan& span = call_.receive(peer_after(i));
    post_receive(call_.out().row(span.first), span.count, type, peer_after(i));
  }
  post_sends();
  if (!call_.in_place()) copy_rows(call_.receive_bytes(rank_), call_.send_bytes(rank_));
  complete();
}

void MpiCollectives::reduce_rows() {
  const std::int64_t rows = call_.receive(rank_).count;
  const std::int64_t bytes = rows * call_.row_bytes();
  partials_.resize(static_cast<std::size_t>(bytes) * ranks_);
  const MPI_Datatype type = receive_type_.get(call_.row_bytes(), call_.row_bytes());
  for (int i = 1; i < ranks_; ++i) {
    std::byte* to = partials_.data() + bytes * peer_after(i);
    sum_.terms()[peer_after(i)] = to;
    post_receive(to, rows, type, peer_after(i));
  }
  post_sends();
  complete();
  sum_.add(call_, 0, bytes);
}

void MpiCollectives::post_receive(void* to, std::int64_t rows, MPI_Datatype type, int peer) {
  // No rows are a message too: every call waits for every peer, so that none goes on while another rejected the call.
  if (call_.row_bytes() == 0) rows = 0;
  MPI_Request request;
  check("MPI_Irecv", MPI_Irecv(to, static_cast<int>(rows), type, peer, tag(), comm_.get(), &request));
  requests_.push_back(request);
  expected_.push_back({peer, rows});
}

void MpiCollectives::post_sends() {
  const MPI_Datatype type = send_type_.get(call_.row_bytes(), stride_bytes(call_.in()));
  for (int i = 1; i < ranks_; ++i) {
    const int peer = peer_after(i);
    const RowSpan& span = call_.send(peer);
    const int rows = call_.row_bytes() == 0 ? 0 : static_cast<int>(span.count);
    MPI_Request request;
    check("MPI_Isend", MPI_Isend(call_.in().row(span.first), rows, type, peer, tag(), comm_.get(), &request));
    requests_.push_back(request);
    expected_.push_back({peer, -1});
  }
}

void MpiCollectives::complete() {
  statuses_.resize(requests_.size());
  std::optional<Deadline> deadline;
  std::optional<Failure> failure;  // found at the last look; what arrived before it counts
  auto next_look = Deadline::Clock::now() + kTick;
  for (int spins = 0;; ++spins) {
    int done = 0;
    const int code = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, statuses_.data());
    if (code == MPI_ERR_IN_STATUS) check_statuses();
    check("MPI_Testall", code);
    if (done) break;
    if (failure) fail(*failure);
    if (spins < kSpins) continue;
    sched_yield();
    if (Deadline::Clock::now() < next_look) continue;
    if (!deadline) deadline = Deadline::after_ms(timeout_ms_);
    failure = look_at_peers(deadline->expired());
    next_look = Deadline::Clock::now() + kTick;
  }
  check_statuses();
}

// Rows that came, but not as many as this rank expects.
void MpiCollectives::check_statuses() {
  for (std::size_t i = 0; i < expected_.size(); ++i) {
    const auto [peer, rows] = expected_[i];
    if (rows < 0) continue;
    int seen = 0;
    MPI_Get_count(&statuses_[i], receive_type_.last(), &seen);
    if (seen == rows) continue;
    fail(failure(FailureKind::mismatch, peer,
                 fmt::format("rank {} sent other than the {} rows of {} bytes that rank {} expects; make the same call on both", peer, rows,
                             call_.row_bytes(), rank_)));
  }
}

std::optional<Failure> MpiCollectives::look_at_peers(bool expired) const {
  if (cancelled_.load(std::memory_order_relaxed)) return failure(FailureKind::system, rank_, "cancelled");
  std::vector<bool> pending(ranks_, false);
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    int done = 0;
    MPI_Request_get_status(requests_[i], &done, MPI_STATUS_IGNORE);
    const int peer = expected_[i].peer;
    if (peer >= 0) pending[peer] = pending[peer] || !done;
    if (peer < 0) pending.assign(ranks_, !done);
  }
  for (int i = 1; i < ranks_; ++i) {
    const int peer = peer_after(i);
    if (!pending[peer]) continue;
    if (auto why = notice_from(peer)) return why;
    if (!world_.alive(peer)) return failure(FailureKind::peer_lost, peer);
    if (!expired) continue;
    return failure(FailureKind::timeout, peer,
                   fmt::format("it did not come, is stopped, or needs a longer timeout_ms (now {})", timeout_ms_));
  }
  return std::nullopt;
}

std::optional<Failure> MpiCollectives::notice_from(int peer) const {
  int arrived = 0;
  MPI_Iprobe(peer, kNoticeTag, comm_.get(), &arrived, MPI_STATUS_IGNORE);
  if (!arrived) return std::nullopt;
  Notice notice;
  MPI_Recv(&notice, sizeof(notice), MPI_BYTE, peer, kNoticeTag, comm_.get(), MPI_STATUS_IGNORE);
  return failure(notice.kind, notice.peer >= 0 ? notice.peer : peer, notice.detail);
}

void MpiCollectives::give_up(const Failure& why) {
  gave_up_ = why;
  leave_requests();
  static std::mutex mutex;
  static std::deque<Notice> notices;  // until exit: MPI may still read them
  const std::lock_guard lock(mutex);
  Notice& notice = notices.emplace_back(Notice{why.kind, why.peer, {}});
  std::memcpy(notice.detail, why.detail.data(), std::min(why.detail.size(), sizeof(notice.detail) - 1));
  for (int i = 1; i < ranks_; ++i) {
    MPI_Request request;
    MPI_Isend(&notice, sizeof(notice), MPI_BYTE, peer_after(i), kNoticeTag, comm_.get(), &request);
    MPI_Request_free(&request);
  }
}

// A receive that has begun writes on until it is complete, so it gets a moment; then the caller's memory is its own again.
void MpiCollectives::leave_requests() {
  constexpr int kMomentMs = 500;
  const Deadline moment = Deadline::after_ms(kMomentMs);
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL || expected_[i].rows < 0) continue;
    MPI_Cancel(&requests_[i]);
    for (int done = 0; done == 0 && !moment.expired();) MPI_Test(&requests_[i], &done, MPI_STATUS_IGNORE);
  }
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL) continue;
    requests_left_behind = true;
    if (expected_[i].peer >= 0) MPI_Request_free(&requests_[i]);
  }
  requests_.clear();
}

bool started_by_mpi() {
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (env(variable)) return true;
  }
  return false;
}

}  // namespace

std::string mpi_objection(const World& world) {
  if (is_finalised()) return "transport mpi: MPI_Finalize was called before; create Collectives earlier";
  if (world.size() == 1) return {};
  if (world.is_in_process()) {
    return fmt::format("transport mpi: the {} ranks of this world are threads, but ranks of MPI are processes; use transport inproc",
                       world.size());
  }
  if (is_initialised() || started_by_mpi()) return {};
  return fmt::format("transport mpi: rank {} was not started by MPI; start the program with 'mpirun -n {} ...', or use transport shm",
                     world.rank(), world.size());
}

std::unique_ptr<Collectives> make_mpi(const World& world, const CollectiveOptions& options) {
  if (!is_initialised()) {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
    std::atexit(finalise_at_exit);
  }
  return std::make_unique<MpiCollectives>(world, options);
}

}  // namespace tokenyard::collective_internal
