#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "core/usage.h"
#include "tokenyard/safetensors.h"

namespace tokenyard {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// Tensor name -> file name, of a checkpoint in several files.
std::map<std::string, std::string> read_index(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  Json root;
  try {
    root = Json::parse(text);
  } catch (const Json::exception& error) {
    usage_error("{}: is no JSON ({}); get the file again", path, error.what());
  }
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    usage_error("{}: lacks the object \"weight_map\"; get the file again", path);
  }
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : root["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name.find('/') != std::string::npos) {
      usage_error("{}: tensor {}: its file is {}; expected the name of a file in the same folder", path, tensor, file.dump());
    }
    files[tensor] = name;
  }
  return files;
}

std::size_t common_length(std::string_view a, std::string_view b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& path) {
  Checkpoint checkpoint;
  checkpoint.path_ = path;
  const std::string index = path + "/model.safetensors.index.json";
  std::error_code ignored;
  if (!fs::is_directory(path, ignored) || !fs::exists(index, ignored)) {
    const std::string file = fs::is_directory(path, ignored) ? path + "/model.safetensors" : path;
    checkpoint.files_.push_back(SafetensorsFile::open(file));
    for (const FileTensor& tensor : checkpoint.files_[0].tensors()) checkpoint.file_of_tensor_[tensor.name] = 0;
    return checkpoint;
  }
  std::map<std::string, std::size_t> opened;
  for (const auto& [tensor, file] : read_index(index)) {
    const auto [at, is_new] = opened.emplace(file, checkpoint.files_.size());
    if (is_new) checkpoint.files_.push_back(SafetensorsFile::open(fmt::format("{}/{}", path, file)));
    if (checkpoint.files_[at->second].find(tensor) == nullptr) {
      usage_error("{}/{}: tensor {} is missing, and {} says it is there; get both files again", path, file, tensor, index);
    }
    checkpoint.file_of_tensor_[tensor] = at->second;
  }
  return checkpoint;
}

bool Checkpoint::contains(std::string_view name) const { return file_of_tensor_.find(name) != file_of_tensor_.end(); }

const SafetensorsFile& Checkpoint::holder(std::string_view name) const {
  const auto found = file_of_tensor_.find(name);
  if (found != file_of_tensor_.end()) return files_[found->second];
  std::string_view nearest;
  for (const auto& [other, file] : file_of_tensor_) {
    if (common_length(other, name) > common_length(nearest, name)) nearest = other;
  }
  usage_error("{}: tensor {}: is missing{}; check the model family, the layer and the number of experts", path_, name,
              nearest.empty() ? "" : fmt::format(" (there is {})", nearest));
}

const FileTensor& Checkpoint::tensor(std::string_view name) const { return *holder(name).find(name); }
const std::string& Checkpoint::file_of(std::string_view name) const { return holder(name).path(); }

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : file_of_tensor_) names.push_back(name);
  return names;
}

}  // namespace tokenyard
