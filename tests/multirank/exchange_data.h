#pragma once
// The inputs of a case, drawn from its seed, and what the reference says must come of them: the same in every process.

#include <cstdint>
#include <vector>

#include "multirank/exchange_case.h"
#include "reference/naive_exchange.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_test {

using naive::Bytes;

// One dispatch, and all that follows on its handle. Vectors have an element per rank.
struct Round {
  std::vector<naive::Input> given;  // rows as the caller has them (not yet quantised)
  std::vector<naive::Output> received;
  std::vector<naive::Input> given_again;  // with cached: other rows and scales, the same routing
  std::vector<naive::Output> received_again;
  std::vector<naive::CombineInput> to_combine;
  std::vector<naive::CombineOutput> combined;
  std::vector<naive::CombineInput> row_grads;  // dispatch_backward: y is the gradient of rows
  std::vector<naive::CombineOutput> dispatch_grads;
  std::vector<Bytes> out_grads;  // combine_backward
  std::vector<naive::CombineGradient> combine_grads;
};

struct CaseData {
  Case config;
  naive::Placement placement;
  std::int64_t max_tokens = 0;
  std::int64_t given_row_bytes = 0;  // of one row as given; what travels is dispatch.row_bytes
  naive::DispatchSpec dispatch;
  naive::CombineSpec combine;
  naive::CombineSpec backward;  // of dispatch_backward
  ExchangeOptions options;      // num_threads apart
  std::vector<Round> rounds;
};

CaseData make_case_data(const Case& c);

// The library's placement for a case, made by the builder that the case names.
Placement library_placement(const Case& c);

// Another one, registered first: numbers of placements matter.
Placement unused_placement(const Case& c);

// `count` floats of `dtype`: ordinary values with, now and then, zeros of both signs, infinities, NaN, subnormals and
// values that overflow in a sum.
Bytes random_values(std::uint64_t seed, std::int64_t count, Dtype dtype, bool with_specials);

}  // namespace tokenyard::exchange_test
