// Between full tensors in our order and the tensors of a checkpoint.

#include <algorithm>
#include <cstring>

#include "core/usage.h"
#include "tokenyard/weights.h"

namespace tokenyard {
namespace {

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text;
  for (const std::int64_t size : shape) text += fmt::format("{}{}", text.empty() ? "[" : ", ", size);
  return text.empty() ? "[]" : text + "]";
}

// The file's tensor for a block, after a look at what it is.
const FileTensor& tensor_of(const Checkpoint& checkpoint, const SourceBlock& block) {
  if (!checkpoint.contains(block.name) && checkpoint.contains(block.name + "_blocks")) {
    usage_error("{}: tensor {}_blocks: is MXFP4, which this library does not read; save the model dequantised (bfloat16) first",
                checkpoint.file_of(block.name + "_blocks"), block.name);
  }
  const FileTensor& tensor = checkpoint.tensor(block.name);
  if (tensor.shape != block.shape) {
    usage_error("{}: tensor {}: its shape is {}, expected {}; check the model family and its sizes", checkpoint.file_of(block.name),
                block.name, shape_text(tensor.shape), shape_text(block.shape));
  }
  if (!tensor.dtype) usage_error("{}: tensor {}: its type is {}, no weight's", checkpoint.file_of(block.name), block.name, tensor.type);
  return tensor;
}

// count elements, `from_step` apart, to places `to_step` apart.
template <std::size_t kBytes>
void copy_strided(std::byte* to, std::int64_t to_step, const std::byte* from, std::int64_t from_step, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_step * static_cast<std::int64_t>(kBytes), from + i * from_step * static_cast<std::int64_t>(kBytes), kBytes);
  }
}

struct Strides {
  std::int64_t to = 1;
  std::int64_t from = 1;
};

void copy_elements(std::byte* to, const std::byte* from, Strides strides, std::int64_t count, int element_bytes) {
  if (strides.to == 1 && strides.from == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(count * element_bytes));
    return;
  }
  const auto copy = element_bytes == 1   ? copy_strided<1>
                    : element_bytes == 2 ? copy_strided<2>
                    : element_bytes == 4 ? copy_strided<4>
                                         : copy_strided<8>;
  copy(to, strides.to, from, strides.from, count);
}

// Cuts elements [begin, begin + count) of a full tensor where a block ends, and rows too unless the block lies as in our order;
// fn(block, offset in the block's tensor, elements before, length).
template <class Fn>
void for_each_piece(const ExpertSource& source, std::int64_t begin, std::int64_t count, Fn&& fn) {
  const std::int64_t block_elements = source.rows * source.columns;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t at = begin + done;
    const SourceBlock& block = source.blocks[static_cast<std::size_t>(at / block_elements)];
    const std::int64_t row = at % block_elements / source.columns;
    const std::int64_t column = at % source.columns;
    const bool has_rows_together = block.row_stride == source.columns * block.column_stride;
    const std::int64_t until = has_rows_together ? block_elements - at % block_elements : source.columns - column;
    const std::int64_t length = std::min(until, count - done);
    fn(block, block.offset + row * block.row_stride + column * block.column_stride, done, length);
    done += length;
  }
}

void check_dense(const ExpertSource& source, const ConstTensorView& view, std::int64_t elements) {
  const bool dense = view.rows_contiguous() && (view.shape[0] <= 1 || view.strides[0] * view.shape[0] == view.num_elements());
  if (!view || view.num_elements() != elements || !dense) {
    usage_error("{}: the tensor given is {}; expected {} dense elements", name(source.tensor), describe(view), elements);
  }
}

std::int64_t elements_of(const ExpertSource& source) { return std::ssize(source.blocks) * source.rows * source.columns; }

}  // namespace

Dtype source_dtype(const Checkpoint& checkpoint, const ExpertSource& source) {
  const SourceBlock* first = &source.blocks.front();
  const Dtype dtype = *tensor_of(checkpoint, *first).dtype;
  for (const SourceBlock& block : source.blocks) {
    const FileTensor& tensor = tensor_of(checkpoint, block);
    if (*tensor.dtype != dtype) {
      usage_error("{}: tensor {}: its type is {}, and that of {} is {}; experts have one type", checkpoint.file_of(block.name), block.name,
                  name(*tensor.dtype), first->name, name(dtype));
    }
  }
  return dtype;
}

void load_shard(const Checkpoint& checkpoint, const ExpertSource& source, const ShardMap& map, const TensorView& out) {
  if (map.global_elements() != elements_of(source)) {
    usage_error("{}: the shard is of {} elements, the tensor has {}; use the shard map of this tensor", name(source.tensor),
                map.global_elements(), elements_of(source));
  }
  check_dense(source, out, map.local_elements());
  const SourceBlock* looked_at = nullptr;
  const FileTensor* tensor = nullptr;
  for (const Run& run : map.runs()) {
    for_each_piece(source, run.global_offset, run.length,
                   [&](const SourceBlock& block, std::int64_t offset, std::int64_t before, std::int64_t length) {
                     if (&block != looked_at) {
                       looked_at = &block;
                       tensor = &tensor_of(checkpoint, block);
                       if (*tensor->dtype != out.dtype) {
                         usage_error("{}: tensor {}: its type is {}, and out is {}; give memory of the file's type (source_dtype)",
                                     checkpoint.file_of(block.name), block.name, name(*tensor->dtype), name(out.dtype));
                       }
                     }
                     const int bytes = size_of(out.dtype);
                     copy_elements(out.as<std::byte>() + (run.local_offset + before) * bytes, tensor->bytes.data() + offset * bytes,
                                   {1, block.column_stride}, length, bytes);
                   });
  }
}

std::vector<TensorPlan> tensor_plans(const ExpertSource& source, Dtype dtype) {
  std::vector<TensorPlan> result;
  for (const SourceBlock& block : source.blocks) {
    if (result.empty() || result.back().name != block.name) result.push_back({block.name, dtype, block.shape});
  }
  return result;
}

void save_full(SafetensorsWriter& writer, const ExpertSource& source, const ConstTensorView& full) {
  check_dense(source, full, elements_of(source));
  const int bytes = size_of(full.dtype);
  const std::int64_t block_elements = source.rows * source.columns;
  std::vector<std::byte> tensor;
  for (std::size_t first = 0; first < source.blocks.size();) {
    const SourceBlock& block = source.blocks[first];
    std::size_t end = first;
    while (end < source.blocks.size() && source.blocks[end].name == block.name) ++end;
    const auto begin = static_cast<std::int64_t>(first) * block_elements;
    const auto count = static_cast<std::int64_t>(end - first) * block_elements;
    tensor.resize(static_cast<std::size_t>(count * bytes));
    for_each_piece(source, begin, count, [&](const SourceBlock& of, std::int64_t offset, std::int64_t before, std::int64_t length) {
      copy_elements(tensor.data() + offset * bytes, full.as<std::byte>() + (begin + before) * bytes, {of.column_stride, 1}, length, bytes);
    });
    writer.write(block.name, tensor);
    first = end;
  }
}

}  // namespace tokenyard
