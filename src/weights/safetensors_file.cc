#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/usage.h"
#include "weights/safetensors_header.h"

namespace tokenyard {
namespace {

class ReadOnlyMapping {
 public:
  ReadOnlyMapping(const std::string& path, int fd) {
    struct stat status = {};
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) usage_error("{}: is no regular file; name a .safetensors file", path);
    bytes_ = static_cast<std::size_t>(status.st_size);
    if (bytes_ == 0) return;
    data_ = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, fd, 0);
    if (data_ == MAP_FAILED) {
      throw TransportError({.kind = FailureKind::system, .detail = fmt::format("{}: cannot be mapped: {}", path, std::strerror(errno))});
    }
  }
  ReadOnlyMapping(const ReadOnlyMapping&) = delete;
  ReadOnlyMapping& operator=(const ReadOnlyMapping&) = delete;
  ~ReadOnlyMapping() {
    if (bytes_ > 0) munmap(data_, bytes_);
  }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), bytes_}; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// The mapping outlives the descriptor.
class OpenFile {
 public:
  explicit OpenFile(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) usage_error("{}: cannot be opened ({}); check the path", path, std::strerror(errno));
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() { close(fd_); }
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

struct SafetensorsFile::State {
  explicit State(const std::string& file) : path(file), mapping(file, OpenFile(file).get()) {
    header = weights_internal::parse_header(path, mapping.bytes());
  }
  std::string path;
  ReadOnlyMapping mapping;
  weights_internal::Header header;
};

SafetensorsFile SafetensorsFile::open(const std::string& path) { return SafetensorsFile(std::make_shared<const State>(path)); }

const std::string& SafetensorsFile::path() const { return state_->path; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return state_->header.metadata; }
std::span<const FileTensor> SafetensorsFile::tensors() const { return state_->header.tensors; }

const FileTensor* SafetensorsFile::find(std::string_view name) const {
  const auto& all = state_->header.tensors;
  const auto at =
      std::lower_bound(all.begin(), all.end(), name, [](const FileTensor& t, std::string_view wanted) { return t.name < wanted; });
  return at != all.end() && at->name == name ? &*at : nullptr;
}

}  // namespace tokenyard
