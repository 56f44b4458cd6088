#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "core/usage.h"
#include "weights/safetensors_header.h"

namespace tokenyard {

struct SafetensorsWriter::State {
  std::string path;
  std::vector<TensorPlan> tensors;
  weights_internal::WrittenHeader header;
  std::vector<bool> written;
  int fd = -1;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (fd < 0) return;
    close(fd);
    unlink(partial().c_str());
  }

  std::string partial() const { return path + ".partial"; }
  [[noreturn]] void fail(const char* what) const {
    throw TransportError({.kind = FailureKind::system, .detail = fmt::format("{}: {}: {}", path, what, std::strerror(errno))});
  }
  std::int64_t end_of(std::size_t tensor) const {
    return tensor + 1 < header.offsets.size() ? header.offsets[tensor + 1] : header.file_bytes;
  }
  void put(std::int64_t offset, const void* data, std::size_t bytes) const {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t done = pwrite(fd, at, bytes, offset);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) fail("cannot be written");
      at += done;
      offset += done;
      bytes -= static_cast<std::size_t>(done);
    }
  }
};

SafetensorsWriter::SafetensorsWriter(std::string path, std::vector<TensorPlan> tensors, const std::map<std::string, std::string>& metadata)
    : state_(std::make_unique<State>()) {
  state_->header = weights_internal::format_header(tensors, metadata);
  state_->path = std::move(path);
  state_->written.resize(tensors.size());
  state_->tensors = std::move(tensors);
  state_->fd = open(state_->partial().c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (state_->fd < 0) usage_error("{}: cannot be created ({}); name a file in a folder of yours", state_->partial(), std::strerror(errno));
  state_->put(0, state_->header.bytes.data(), state_->header.bytes.size());
  if (ftruncate(state_->fd, state_->header.file_bytes) != 0) state_->fail("cannot get its size");
}

SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(std::string_view name, std::span<const std::byte> bytes) {
  for (std::size_t i = 0; i < state_->tensors.size(); ++i) {
    if (state_->tensors[i].name != name) continue;
    if (state_->written[i]) usage_error("{}: tensor {} is written already", state_->path, name);
    const std::int64_t planned = state_->end_of(i) - state_->header.offsets[i];
    if (std::ssize(bytes) != planned) usage_error("{}: tensor {} has {} bytes, planned were {}", state_->path, name, bytes.size(), planned);
    state_->put(state_->header.offsets[i], bytes.data(), bytes.size());
    state_->written[i] = true;
    return;
  }
  usage_error("{}: tensor {} was not planned; name all tensors when the writer is made", state_->path, name);
}

void SafetensorsWriter::finish() {
  for (std::size_t i = 0; i < state_->tensors.size(); ++i) {
    if (!state_->written[i])
      usage_error("{}: tensor {} was not written; write all that were planned", state_->path, state_->tensors[i].name);
  }
  if (fsync(state_->fd) != 0) state_->fail("cannot be written");
  if (std::rename(state_->partial().c_str(), state_->path.c_str()) != 0) state_->fail("cannot get its name");
  close(std::exchange(state_->fd, -1));
}

}  // namespace tokenyard
