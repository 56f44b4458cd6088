#include <algorithm>

#include "core/usage.h"
#include "tokenyard/weights.h"

namespace tokenyard {

ShardMap ShardMap::whole(std::int64_t global_elements) { return of_ranges(global_elements, {{0, 0, global_elements}}); }

ShardMap ShardMap::of_ranges(std::int64_t global_elements, const std::vector<Run>& ranges) {
  ShardMap map;
  map.global_elements_ = global_elements;
  std::int64_t local = 0;
  for (const Run& range : ranges) {
    if (range.global_offset < 0 || range.length < 0 || range.global_offset > global_elements - range.length) {
      usage_error("elements {} to {} are not all in a tensor of {}", range.global_offset, range.global_offset + range.length,
                  global_elements);
    }
    if (range.length == 0) continue;
    Run* last = map.runs_.empty() ? nullptr : &map.runs_.back();
    if (last != nullptr && last->global_offset + last->length == range.global_offset) {
      last->length += range.length;
    } else {
      map.runs_.push_back({range.global_offset, local, range.length});
    }
    local += range.length;
  }
  std::vector<Run> sorted = map.runs_;
  std::sort(sorted.begin(), sorted.end(), [](const Run& a, const Run& b) { return a.global_offset < b.global_offset; });
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    const std::int64_t end = sorted[i - 1].global_offset + sorted[i - 1].length;
    if (end > sorted[i].global_offset) usage_error("element {} is held twice by one shard; ranges do not overlap", sorted[i].global_offset);
  }
  return map;
}

ShardMap ShardMap::part(int parts, int index, std::int64_t unit) const {
  if (parts < 1 || index < 0 || index >= parts) usage_error("part {} of {}; use parts >= 1 and an index in 0..parts - 1", index, parts);
  if (unit < 1 || local_elements() % unit != 0) {
    usage_error("unit = {} does not divide the {} elements of the shard; use a divisor, or 1", unit, local_elements());
  }
  const std::int64_t units = local_elements() / unit;
  const auto first = [&](std::int64_t i) { return (i * (units / parts) + std::min<std::int64_t>(i, units % parts)) * unit; };
  const std::int64_t begin = first(index);
  const std::int64_t end = first(index + 1);
  std::vector<Run> ranges;
  for (const Run& run : runs_) {
    const std::int64_t from = std::max(begin, run.local_offset);
    const std::int64_t to = std::min(end, run.local_offset + run.length);
    if (from < to) ranges.push_back({run.global_offset + from - run.local_offset, 0, to - from});
  }
  return of_ranges(global_elements_, ranges);
}

std::int64_t ShardMap::global_index(std::int64_t local_index) const {
  if (local_index < 0 || local_index >= local_elements()) {
    usage_error("local index {}; this shard has {} elements", local_index, local_elements());
  }
  const auto after = std::upper_bound(runs_.begin(), runs_.end(), local_index,
                                      [](std::int64_t index, const Run& run) { return index < run.local_offset; });
  const Run& run = *std::prev(after);
  return run.global_offset + local_index - run.local_offset;
}

}  // namespace tokenyard
