#include "files.h"

#include <fmt/core.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "core/usage.h"

namespace tokenyard::cli {

namespace fs = std::filesystem;

std::string read_file(const std::string& option, const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) usage_error("{} {}: is a folder; name a file", option, path);
  std::ifstream in(path, std::ios::binary);
  if (!in) usage_error("{} {}: cannot be read ({}); check the path", option, path, std::strerror(errno));
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void require_writable(const std::string& option, const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) usage_error("{} {}: is a folder; name a file in it", option, path);
  const fs::path parent = fs::absolute(path).parent_path();
  if (!fs::is_directory(parent, ignored)) {
    usage_error("{} {}: folder {} does not exist; create it (mkdir -p) or name another file", option, path, parent.string());
  }
  const bool exists = fs::exists(path, ignored);
  if (::access(exists ? path.c_str() : parent.c_str(), W_OK) != 0) {
    usage_error("{} {}: cannot be written ({}); name a file in a folder of yours", option, path, std::strerror(errno));
  }
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  if (!out) throw Error(fmt::format("{}: cannot be written ({}); free space or name another file", path, std::strerror(errno)));
}

void write_result(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  write_file(path, text);
  fmt::print("written: {}\n", path);
}

}  // namespace tokenyard::cli
