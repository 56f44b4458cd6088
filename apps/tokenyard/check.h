#pragma once
// The independent check of dispatch and combine: what a rank must have received follows from the seed of the workload and the
// placement alone; nothing of the exchange's own code is used.

#include <optional>
#include <string>
#include <vector>

#include "tokenyard/exchange.h"
#include "workload.h"

namespace tokenyard::cli {

// The first place that is not as it must be.
struct Difference {
  std::string what;  // "row", "source_token", "sum", ...
  int rank = 0;
  std::int64_t slot = 0;
  std::string expected;
  std::string seen;
  std::string message() const;
};

// One expert's row of one token on this rank.
struct Arrival {
  int source_rank = 0;
  std::int64_t token = 0;
  int k = 0;
  int local = 0;
  float weight = 0;
};

// "Experts" multiply a row by a power of two that depends on their rank: no partial sum can stand in for another, and sums stay exact.
double expert_scale(int rank);
// y [as rows] in the workload's expert_dtype(): every received row, scaled.
std::vector<std::byte> expert_output(const Workload& workload, const Received& received, int rank);

class Checker {
 public:
  Checker(const Workload& workload, const Placement& placement, int rank);

  // Rows bit for bit, and their metadata.
  std::optional<Difference> dispatched(const Received& received) const;
  // The sums of expert_output() over all ranks. Unweighted: exact. Weighted by the workload's weights: within `tolerance` of the sum of
  // magnitudes, in double.
  std::optional<Difference> combined(const ConstTensorView& out, Layout layout, Weighting weighting) const;
  static double tolerance(Dtype dtype);

 private:
  std::optional<Difference> token_rows(const Received& received) const;
  std::optional<Difference> gather_map(const Received& received) const;
  std::optional<Difference> expert_rows(const Received& received) const;
  std::optional<Difference> slot_rows(const Received& received) const;
  std::optional<Difference> compare_row(const Received& received, std::int64_t slot, const Arrival& arrival) const;
  std::vector<double> coefficients(std::int64_t token, bool folded_by_caller, bool weighted) const;
  std::vector<std::vector<Arrival>> tokens_here() const;

  const Workload& workload_;
  const Placement& placement_;
  int rank_;
  std::vector<Routing> routing_;   // [R]
  std::vector<Arrival> arrivals_;  // ordered by (source rank, token, k)
};

}  // namespace tokenyard::cli
