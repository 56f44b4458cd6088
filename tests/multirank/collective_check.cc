#include "multirank/collective_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace tokenyard::collective_test {
namespace {

using Counts = std::vector<std::int64_t>;

std::uint64_t mix(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

double load(const std::byte* from, Dtype dtype) {
  std::uint16_t half = 0;
  float single = 0;
  double wide = 0;
  switch (dtype) {
    case Dtype::float64:
      std::memcpy(&wide, from, 8);
      return wide;
    case Dtype::float32:
      std::memcpy(&single, from, 4);
      return single;
    case Dtype::bfloat16:
      std::memcpy(&half, from, 2);
      return bfloat16_to_float(half);
    default:
      std::memcpy(&half, from, 2);
      return float16_to_float(half);
  }
}

void store(std::byte* to, double value, Dtype dtype) {
  const auto single = static_cast<float>(value);
  std::uint16_t half = 0;
  switch (dtype) {
    case Dtype::float64:
      std::memcpy(to, &value, 8);
      return;
    case Dtype::float32:
      std::memcpy(to, &single, 4);
      return;
    case Dtype::bfloat16:
      half = float_to_bfloat16(single);
      break;
    default:
      half = float_to_float16(single);
      break;
  }
  std::memcpy(to, &half, 2);
}

// Rows with a gap of `gap` elements behind each, all bytes 0xa5 at first, so that a write beside a row shows.
struct Rows {
  Rows(std::int64_t count, std::int64_t elements, Dtype type, std::int64_t gap)
      : row_bytes(elements * size_of(type)), stride_bytes((elements + gap) * size_of(type)), bytes(count * stride_bytes, std::byte{0xa5}) {
    view = TensorView(bytes.data(), type, {count, elements});
    view.strides[0] = elements + gap;
  }
  TensorView part(std::int64_t first, std::int64_t count) const {
    TensorView result = view;
    result.data = view.row(first);
    result.shape[0] = count;
    return result;
  }
  std::byte* row(std::int64_t i) { return bytes.data() + i * stride_bytes; }

  std::int64_t row_bytes;
  std::int64_t stride_bytes;
  std::vector<std::byte> bytes;
  TensorView view;
};

class Checker {
 public:
  Checker(Collectives& collectives, const CheckOptions& options)
      : collectives_(collectives),
        options_(options),
        rank_(collectives.world().rank()),
        ranks_(collectives.world().size()),
        random_(options.seed) {}

  void run() {
    for (int round = 0; round < options_.rounds; ++round) {
      context_ = "seed " + std::to_string(options_.seed) + ", round " + std::to_string(round) + ", rank " + std::to_string(rank_);
      all_gather();
      reduce_scatter();
      all_to_all();
      collectives_.barrier();
    }
  }

 private:
  std::int64_t pick(std::int64_t below) { return std::uniform_int_distribution<std::int64_t>(0, below - 1)(random_); }
  Counts pick_counts() {
    Counts counts(ranks_);
    const bool none = pick(8) == 0;
    for (auto& count : counts) count = none || pick(3) == 0 ? 0 : pick(options_.max_rows + 1);
    return counts;
  }
  void pick_shape(Dtype dtype) {
    dtype_ = dtype;
    const std::int64_t multiple = options_.multiple_of;
    elements_ = (pick(10) == 0 ? pick(2) : 1 + pick((options_.max_elements + multiple - 1) / multiple)) * multiple;
    salt_ = mix(options_.seed ^ static_cast<std::uint64_t>(pick(1 << 30)));
    in_place_ = pick(3) == 0;
    in_gap_ = pick(2) == 0 ? 0 : 5 * multiple;
    out_gap_ = in_place_ || pick(2) == 0 ? in_gap_ : 3 * multiple;
  }
  // Row `row` of what `rank` passes as in. For sums: a value of moderate size, so that rounding matters and order shows.
  void fill(std::byte* to, int rank, std::int64_t row) const {
    for (std::int64_t i = 0; i < elements_; ++i) {
      const std::uint64_t bits =
          mix(salt_ + mix(static_cast<std::uint64_t>(rank) << 48 ^ static_cast<std::uint64_t>(row) << 20 ^ static_cast<std::uint64_t>(i)));
      std::byte* element = to + i * size_of(dtype_);
      if (!is_summable(dtype_)) {
        std::memcpy(element, &bits, size_of(dtype_));
      } else {
        const int exponent = static_cast<int>(bits % 12) - 6;
        store(element, std::ldexp(static_cast<double>(bits >> 11) / (1ULL << 52) - 1.0, exponent), dtype_);
      }
    }
  }
  void expect_row(const Rows& rows, std::int64_t index, const std::vector<std::byte>& expected, const char* what) const {
    const std::byte* seen = rows.bytes.data() + index * rows.stride_bytes;
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), seen))
        << what << " row " << index << " of " << context_ << ", dtype " << name(dtype_) << ", elements " << elements_
        << (in_place_ ? ", in place" : "");
    for (std::int64_t i = rows.row_bytes; i < rows.stride_bytes; ++i) {
      ASSERT_EQ(seen[i], std::byte{0xa5}) << what << ": a byte behind row " << index << " was written; " << context_;
    }
  }
  static std::int64_t total(const Counts& counts, int ranks) {
    std::int64_t sum = 0;
    for (int r = 0; r < ranks; ++r) sum += counts[r];
    return sum;
  }

  void all_gather() {
    static constexpr Dtype kTypes[] = {Dtype::uint8, Dtype::bfloat16, Dtype::float32, Dtype::int64};
    const Counts counts = pick_counts();
    pick_shape(kTypes[pick(4)]);
    Rows out(total(counts, ranks_), elements_, dtype_, out_gap_);
    Rows own(counts[rank_], elements_, dtype_, in_gap_);
    const std::int64_t first = total(counts, rank_);
    for (std::int64_t i = 0; i < counts[rank_]; ++i) fill(in_place_ ? out.row(first + i) : own.row(i), rank_, i);
    collectives_.all_gather_v(in_place_ ? out.part(first, counts[rank_]) : own.view, counts, out.view);
    std::vector<std::byte> expected(out.row_bytes);
    std::int64_t row = 0;
    for (int source = 0; source < ranks_; ++source) {
      for (std::int64_t i = 0; i < counts[source]; ++i) {
        fill(expected.data(), source, i);
        expect_row(out, row++, expected, "all_gather_v");
      }
    }
  }

  void reduce_scatter() {
    static constexpr Dtype kTypes[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};
    const Counts counts = pick_counts();
    pick_shape(kTypes[pick(4)]);
    Rows in(total(counts, ranks_), elements_, dtype_, in_gap_);
    Rows own(counts[rank_], elements_, dtype_, out_gap_);
    for (std::int64_t i = 0; i < total(counts, ranks_); ++i) fill(in.row(i), rank_, i);
    const std::int64_t first = total(counts, rank_);
    collectives_.reduce_scatter_v(in.view, counts, in_place_ ? in.part(first, counts[rank_]) : own.view);
    std::vector<std::byte> expected(in.row_bytes), term(in.row_bytes);
    for (std::int64_t i = 0; i < counts[rank_]; ++i) {
      sum_row(expected, term, first + i);
      expect_row(in_place_ ? in : own, in_place_ ? first + i : i, expected, "reduce_scatter_v");
    }
  }

  void sum_row(std::vector<std::byte>& sum, std::vector<std::byte>& term, std::int64_t row) const {
    std::vector<double> wide(elements_, 0.0);
    std::vector<float> single(elements_, 0.0F);
    for (int source = 0; source < ranks_; ++source) {
      fill(term.data(), source, row);
      for (std::int64_t i = 0; i < elements_; ++i) {
        const double value = load(term.data() + i * size_of(dtype_), dtype_);
        wide[i] += value;
        single[i] += static_cast<float>(value);
      }
    }
    for (std::int64_t i = 0; i < elements_; ++i)
      store(sum.data() + i * size_of(dtype_), dtype_ == Dtype::float64 ? wide[i] : single[i], dtype_);
  }

  void all_to_all() {
    static constexpr Dtype kTypes[] = {Dtype::uint8, Dtype::float16, Dtype::int32, Dtype::float64};
    std::vector<Counts> counts(ranks_);  // [source][target]
    for (auto& row : counts) row = pick_counts();
    pick_shape(kTypes[pick(4)]);
    in_place_ = false;
    Counts received(ranks_);
    for (int source = 0; source < ranks_; ++source) received[source] = counts[source][rank_];
    Rows in(total(counts[rank_], ranks_), elements_, dtype_, in_gap_);
    Rows out(total(received, ranks_), elements_, dtype_, out_gap_);
    for (std::int64_t i = 0; i < total(counts[rank_], ranks_); ++i) fill(in.row(i), rank_, i);
    collectives_.all_to_all_v(in.view, counts[rank_], out.view, received);
    std::vector<std::byte> expected(out.row_bytes);
    std::int64_t row = 0;
    for (int source = 0; source < ranks_; ++source) {
      const std::int64_t first = total(counts[source], rank_);
      for (std::int64_t i = 0; i < received[source]; ++i) {
        fill(expected.data(), source, first + i);
        expect_row(out, row++, expected, "all_to_all_v");
      }
    }
  }

  Collectives& collectives_;
  const CheckOptions& options_;
  int rank_;
  int ranks_;
  std::mt19937_64 random_;  // the same draws on every rank
  std::string context_;
  Dtype dtype_ = Dtype::uint8;
  std::int64_t elements_ = 0;
  std::uint64_t salt_ = 0;
  bool in_place_ = false;
  std::int64_t in_gap_ = 0;
  std::int64_t out_gap_ = 0;
};

}  // namespace

void check_collectives(Collectives& collectives, const CheckOptions& options) { Checker(collectives, options).run(); }

std::uint64_t test_seed() {
  const char* text = std::getenv("TOKENYARD_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
}

}  // namespace tokenyard::collective_test
