#pragma once
// Hugging Face safetensors files, read by mapping and written one tensor at a time.
// Format: https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the tensors' bytes.
//
// A file that is broken is a UsageError naming file, tensor and reason; TransportError(system) when the operating system refuses.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/dtype.h"

namespace tokenyard {

struct FileTensor {
  std::string name;
  std::string type;              // as the file spells it: "BF16", "F8_E4M3", ...
  std::optional<Dtype> dtype{};  // none for types that this library does not compute with; they can still be copied
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, not necessarily aligned; read from the disk when touched
};

// One file, mapped. Copies share it; spans are valid while one lives. A file that somebody shortens meanwhile ends the process (SIGBUS).
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path);
  const std::string& path() const;
  const std::map<std::string, std::string>& metadata() const;
  std::span<const FileTensor> tensors() const;  // ascending by name
  // nullptr when there is none.
  const FileTensor* find(std::string_view name) const;

 private:
  struct State;
  explicit SafetensorsFile(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

// A model: one file, or a folder with model.safetensors.index.json and the files it names, or with model.safetensors.
class Checkpoint {
 public:
  static Checkpoint open(const std::string& path);
  bool contains(std::string_view name) const;
  // UsageError when it is not there, naming the checkpoint and, if there is one, a tensor whose name begins alike.
  const FileTensor& tensor(std::string_view name) const;
  // The file that holds it, for error texts.
  const std::string& file_of(std::string_view name) const;
  std::vector<std::string> names() const;  // ascending

 private:
  const SafetensorsFile& holder(std::string_view name) const;
  std::string path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t, std::less<>> file_of_tensor_;
};

struct TensorPlan {
  std::string name;
  Dtype dtype = Dtype::float32;
  std::vector<std::int64_t> shape;
  bool operator==(const TensorPlan&) const = default;
};

// The header is written first, then each tensor when it is there, in any order: no more than one has to be in memory. The file
// appears under its name at finish(); before, it is `path`.partial, which is removed if this object ends without.
class SafetensorsWriter {
 public:
  // UsageError for a repeated or empty name, a negative or overflowing shape, or a path that cannot be created.
  SafetensorsWriter(std::string path, std::vector<TensorPlan> tensors, const std::map<std::string, std::string>& metadata = {});
  SafetensorsWriter(SafetensorsWriter&&) noexcept;
  ~SafetensorsWriter();
  // UsageError for a name that was not planned or is written already, or another number of bytes than planned.
  void write(std::string_view name, std::span<const std::byte> bytes);
  // UsageError names a tensor that was not written.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tokenyard
