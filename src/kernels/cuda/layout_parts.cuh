#pragma once
// From received rows to the order of a layout: a stable counting sort of (row, k) by local expert. Rows are cut into chunks;
// a table [chunks][columns] holds how often each local expert occurs in a chunk. The last column counts rows that are present,
// to close gaps (token_major in latency mode).

#include "kernels/cuda/received.cuh"

namespace tokenyard::cuda {

struct Chunk {
  std::int32_t begin = 0;  // received rows
  std::int32_t end = 0;
};

__device__ inline int layout_columns(const GroupArgs& args) { return args.local_experts + 1; }
__device__ inline bool is_expert_layout(const GroupArgs& args) {
  return args.layout == Layout::expert_major || args.layout == Layout::expert_padded;
}
// token_major where received rows have gaps.
__device__ inline bool is_compacted(const LayoutArgs& args) { return args.layout == Layout::token_major && args.mode == Mode::latency; }
__device__ inline std::int32_t local_id_at(const LayoutArgs& args, std::int64_t pair) {
  const std::int32_t local = args.handle.local_ids[pair];
  return local < args.local_experts ? local : -1;  // what a peer sent must not lead out of the tables
}

// Rows that can hold anything: in throughput mode what arrived, in latency mode all slots.
__device__ inline std::int32_t used_rows(const LayoutArgs& args) {
  if (args.mode == Mode::throughput) return args.handle.header->num_rows;
  return static_cast<std::int32_t>(received_capacity(args.context, args.mode));
}
// Rows behind those that arrived are part of it: they are marked as absent.
__device__ inline Chunk chunk_at(const LayoutArgs& args, int chunk) {
  const std::int64_t rows = received_capacity(args.context, args.mode);
  return {static_cast<std::int32_t>(min(std::int64_t{chunk} * args.table.chunk_rows, rows)),
          static_cast<std::int32_t>(min(std::int64_t{chunk + 1} * args.table.chunk_rows, rows))};
}

// Where the groups of the local experts lie in the output.
struct Groups {
  std::int32_t* kept = nullptr;    // [L] rows of each: first true counts, then without drops
  std::int32_t* begins = nullptr;  // [L+1]
};
struct GroupsMemory {
  std::int64_t sums[kLanes];  // of warps
  std::int64_t rows;          // of all groups so far, with padding
  std::int64_t kept;
  int overflowing;  // the first local expert beyond its capacity
};

// What a block that lays out sums up, protocol::layout_words() in shared memory; in global memory where they are too many.
struct LayoutMemory {
  std::int32_t* next;  // [columns]: where the chunk's next row of it goes, counted in its group
  Groups groups;
  std::int32_t* warp_counts;  // [warps][columns]: of one round, then where the warp's rows go; zero between rounds

  __device__ LayoutMemory(std::int32_t* words, int columns)
      : next(words), groups{words + columns, words + 2 * columns}, warp_counts(words + 3 * columns) {}
};

// What lies before a chunk, into layout.next, and in all chunks, into layout.groups.kept. By the block, and added to zeros.
__device__ inline void sum_chunks(const LayoutArgs& args, const LayoutMemory& layout, int chunk, int chunks) {
  const int columns = layout_columns(args);
  const int used = min(chunks, (used_rows(args) + args.table.chunk_rows - 1) / args.table.chunk_rows);
  const auto threads = static_cast<int>(blockDim.x);
  const int parts = max(1, threads / columns);
  for (int i = threadIdx.x; i < parts * columns; i += threads) {
    const int column = i % columns;
    std::int32_t before = 0, all = 0;
#pragma unroll 8
    for (int other = i / columns; other < used; other += parts) {
      const std::int32_t count = args.table.counts[other * columns + column];
      all += count;
      if (other < chunk) before += count;
    }
    atomicAdd(&layout.next[column], before);
    if (column < args.local_experts) atomicAdd(&layout.groups.kept[column], all);
  }
}

// Inclusive sum over the crew; `sums` holds one number per warp. Begins and ends with a barrier.
__device__ inline std::int64_t crew_inclusive_sum(std::int64_t value, std::int64_t* sums, const Crew& crew) {
  const std::int64_t inclusive = inclusive_sum(value);
  crew.sync();
  if (lane_index() == kLanes - 1) sums[crew.warp()] = inclusive;
  crew.sync();
  std::int64_t before = 0;
  for (int warp = 0; warp < crew.warp(); ++warp) before += sums[warp];
  return before + inclusive;
}

__device__ inline std::int64_t kept_of(const GroupArgs& args, std::int64_t count) {
  return args.expert_capacity != 0 && count > args.expert_capacity ? args.expert_capacity : count;
}
__device__ inline std::int64_t group_size(const GroupArgs& args, std::int64_t kept) {
  if (args.layout == Layout::expert_padded) return args.expert_capacity;
  return args.layout == Layout::expert_major ? protocol::align_up(kept, args.alignment) : kept;
}

// Fails the call when the groups do not fit. The count matrix has excluded that in throughput mode; in latency mode only the
// receiver knows, so this rank fails alone and tells the others. Only one block reports. Block-uniform.
__device__ inline bool groups_fit(const LayoutArgs& args, const Groups& groups, const GroupsMemory& memory, bool report) {
  const Context& c = args.context;
  const int first = memory.overflowing;
  if (first < args.local_experts) {
    if (report && threadIdx.x == 0) {
      fail(c, FailureKind::overflow, Phase::dispatch_rows, c.rank, args.expert_capacity, groups.kept[first]);
    }
    return false;
  }
  if (!is_expert_layout(args) || memory.rows <= args.output_rows) return true;
  if (report && threadIdx.x == 0) fail(c, FailureKind::overflow, Phase::dispatch_rows, c.rank, args.output_rows, memory.rows);
  return false;
}

// From true counts in groups.kept to where groups begin, by the crew. Ends with a barrier.
__device__ inline void sum_groups(const GroupArgs& args, const Groups& groups, GroupsMemory& memory, const Crew& crew) {
  const int experts = args.local_experts;
  if (crew.index() == 0) {
    memory.rows = memory.kept = 0;
    memory.overflowing = experts;
  }
  crew.sync();
  for (int first = 0; first < experts; first += crew.count()) {
    const int local = first + crew.index();
    const std::int64_t count = local < experts ? groups.kept[local] : 0;
    const std::int64_t kept = kept_of(args, count);
    const std::int64_t size = local < experts ? group_size(args, kept) : 0;
    const std::int64_t rows_before = memory.rows, kept_before = memory.kept;
    const std::int64_t end = rows_before + crew_inclusive_sum(size, memory.sums, crew);
    const std::int64_t kept_end = kept_before + crew_inclusive_sum(kept, memory.sums, crew);
    if (local < experts) groups.begins[local] = static_cast<std::int32_t>(end - size);
    if (kept < count && !args.drop) atomicMin(&memory.overflowing, local);
    crew.sync();
    if (crew.index() == crew.count() - 1) {
      memory.rows = end;
      memory.kept = kept_end;
    }
    crew.sync();
  }
}

// From true counts in groups.kept to groups, by the block; all of them empty when they do not fit. Ends with a barrier.
// `writes`: this block also fills what the handle says of experts.
__device__ inline bool make_groups(const LayoutArgs& args, const Groups& groups, GroupsMemory& memory, bool writes) {
  const HandleView& handle = args.handle;
  const int experts = args.local_experts;
  sum_groups(args, groups, memory, {});
  const bool fit = groups_fit(args, groups, memory, writes);
  __syncthreads();
  for (int local = threadIdx.x; local < experts; local += static_cast<int>(blockDim.x)) {
    const std::int32_t count = groups.kept[local];
    const auto kept = fit ? static_cast<std::int32_t>(kept_of(args, count)) : 0;
    groups.kept[local] = kept;
    if (!fit) groups.begins[local] = 0;
    if (!writes) continue;
    handle.expert_counts[local] = kept;
    handle.dropped[local] = fit ? count - kept : 0;
    handle.expert_offsets[local] = groups.begins[local];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    groups.begins[experts] = fit ? static_cast<std::int32_t>(memory.rows) : 0;
    if (!fit) memory.rows = memory.kept = 0;
    if (writes) handle.expert_offsets[experts] = groups.begins[experts];
  }
  __syncthreads();
  return fit;
}

// What the header learns from the groups. By one thread.
__device__ inline void tell_groups(const LayoutArgs& args, const GroupsMemory& memory, bool fit) {
  HandleView::Header& header = *args.handle.header;
  if (!fit) header.num_rows = 0;
  header.layout_rows = header.num_rows;
  if (args.layout == Layout::expert_major) header.layout_rows = static_cast<std::int32_t>(memory.rows);
  if (args.layout == Layout::expert_padded) header.layout_rows = static_cast<std::int32_t>(memory.kept);
}

// Rows of token_major without gaps: `next` is where the chunk's first present row goes. By one warp.
__device__ inline void compact_rows(const LayoutArgs& args, Chunk chunk, std::int32_t next) {
  const HandleView& handle = args.handle;
  for (std::int32_t begin = chunk.begin; begin < chunk.end; begin += kLanes) {
    const std::int32_t row = begin + lane_index();
    const bool present = row < chunk.end && handle.source_token[row] >= 0;
    const unsigned all = __ballot_sync(kAllLanes, present);
    const std::int32_t to = present ? next + __popc(all & lanes_below()) : -1;
    if (row < chunk.end) handle.output_row[row] = to;
    if (present) {
      handle.out_source_rank[to] = handle.source_rank[row];
      handle.out_source_token[to] = handle.source_token[row];
    }
    next += __popc(all);
  }
}

// The choices of a row that was compacted.
__device__ inline void compact_pair(const HandleView& handle, std::int64_t pair) {
  const std::int32_t to = handle.output_row[pair / handle.top_k];
  if (to < 0) return;
  const std::int64_t at = static_cast<std::int64_t>(to) * handle.top_k + pair % handle.top_k;
  handle.out_local_ids[at] = handle.local_ids[pair];
  handle.out_weights[at] = handle.weights[pair];
}

// Where one (row, k) goes that is number `position` of its local expert (local < 0: none).
__device__ inline void place_pair(const LayoutArgs& args, const Groups& groups, std::int64_t pair, std::int32_t local,
                                  std::int32_t position) {
  const HandleView& handle = args.handle;
  const std::int64_t row = pair / handle.top_k;
  if (is_expert_layout(args)) {
    std::int32_t to = -1;
    if (local >= 0 && position < groups.kept[local]) {
      to = groups.begins[local] + position;
      handle.out_weights[to] = handle.weights[pair];
      handle.out_source_rank[to] = handle.source_rank[row];
      handle.out_source_token[to] = handle.source_token[row];
      handle.out_source_k[to] = static_cast<std::int32_t>(pair - row * handle.top_k);
    }
    handle.output_row[pair] = to;
  } else if (local >= 0 && position < groups.kept[local]) {
    const std::int64_t to = groups.begins[local] + position;
    if (to < args.map_rows) handle.gather_map[to] = is_compacted(args) ? handle.output_row[row] : static_cast<std::int32_t>(row);
  }
}

// From what each warp has of a column in this round to where its first one goes. By the crew.
__device__ inline void scan_warps(const GroupArgs& args, const LayoutMemory& layout, const Crew& crew) {
  const int columns = layout_columns(args);
  for (int column = crew.index(); column < args.local_experts; column += crew.count()) {
    std::int32_t next = layout.next[column];
#pragma unroll 8
    for (int warp = 0; warp < crew.warps(); ++warp) {
      std::int32_t& count = layout.warp_counts[warp * columns + column];
      const std::int32_t begin = next;
      next += count;
      count = begin;
    }
    layout.next[column] = next;
  }
}

struct Pairs {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Finds for each pair its number in its group, by the crew: a pair for each thread in their order, and as many again.
// local_of(pair) is its local expert or -1; put(pair, local, number) takes the answer.
template <class LocalOf, class Put>
__device__ inline void place_pairs(const GroupArgs& args, const LayoutMemory& layout, Pairs pairs, const Crew& crew, LocalOf&& local_of,
                                   Put&& put) {
  std::int32_t* const of_warp = layout.warp_counts + crew.warp() * layout_columns(args);
  const std::int64_t threads = crew.count(), end = pairs.end;
  for (std::int64_t begin = pairs.begin; begin < end; begin += threads) {
    const std::int64_t pair = begin + crew.index();
    const std::int32_t local = pair < end ? local_of(pair) : -1;
    const unsigned alike = __match_any_sync(kAllLanes, local);
    const int before = __popc(alike & lanes_below());
    if (local >= 0 && before == 0) of_warp[local] = __popc(alike);
    crew.sync();
    scan_warps(args, layout, crew);
    crew.sync();
    if (pair < end) put(pair, local, local >= 0 ? of_warp[local] + before : 0);
    if (begin + threads >= end) break;
    crew.sync();
    for (int i = crew.index(); i < layout_columns(args) * crew.warps(); i += crew.count()) layout.warp_counts[i] = 0;
    crew.sync();
  }
}

// Places a chunk by the block. Begins with a barrier.
__device__ inline void place_rows(const LayoutArgs& args, const LayoutMemory& layout, Chunk chunk) {
  __syncthreads();  // groups are final
  const bool compacts = is_compacted(args);
  if (compacts && warp_index() == 0) compact_rows(args, chunk, layout.next[args.local_experts]);
  if (!is_expert_layout(args) && !args.gather_map && !compacts) return;
  const std::int64_t top_k = args.handle.top_k;
  place_pairs(
      args, layout, {chunk.begin * top_k, chunk.end * top_k}, {}, [&](std::int64_t pair) { return local_id_at(args, pair); },
      [&](std::int64_t pair, std::int32_t local, std::int32_t number) {
        place_pair(args, layout.groups, pair, local, number);
        if (compacts) compact_pair(args.handle, pair);
      });
}

// What no row goes to, by the threads of `blocks` blocks, this one being number `block`: the defaults of Received. Rows that are placed
// are left alone, so that blocks need not wait for each other.
__device__ inline void fill_rest(const LayoutArgs& args, const Groups& groups, unsigned block, unsigned blocks) {
  const HandleView& handle = args.handle;
  const auto thread = static_cast<std::int64_t>(block) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<std::int64_t>(blocks) * blockDim.x;
  const int experts = args.local_experts;
  if (args.layout == Layout::expert_padded) {
    const auto capacity = static_cast<std::uint32_t>(args.expert_capacity);
    const std::int64_t rows = experts * args.expert_capacity;
    for (std::int64_t row = thread; row < rows; row += threads) {
      const std::uint32_t local = static_cast<std::uint32_t>(row) / capacity;
      if (static_cast<std::int32_t>(static_cast<std::uint32_t>(row) - local * capacity) >= groups.kept[local]) clear_output(handle, row);
    }
  } else if (args.layout == Layout::expert_major) {
    for (std::int64_t local = thread / kLanes; local < experts; local += threads / kLanes) {
      for (int row = groups.begins[local] + groups.kept[local] + lane_index(); row < groups.begins[local + 1]; row += kLanes) {
        clear_output(handle, row);
      }
    }
    for (std::int64_t row = groups.begins[experts] + thread; row < args.output_rows; row += threads) clear_output(handle, row);
  } else {
    for (std::int64_t at = groups.begins[experts] + thread; args.gather_map && at < args.map_rows; at += threads)
      handle.gather_map[at] = -1;
  }
  if (!is_compacted(args)) return;
  const std::int64_t top_k = handle.top_k;
  const std::int64_t rows = handle.header->num_rows, capacity = received_capacity(args.context, args.mode);
  for (std::int64_t row = rows + thread; row < capacity; row += threads) handle.out_source_rank[row] = handle.out_source_token[row] = -1;
  for (std::int64_t at = rows * top_k + thread; at < capacity * top_k; at += threads) {
    handle.out_local_ids[at] = -1;
    handle.out_weights[at] = 0.0F;
  }
}

}  // namespace tokenyard::cuda
