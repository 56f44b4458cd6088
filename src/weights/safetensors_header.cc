#include "weights/safetensors_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "core/usage.h"

namespace tokenyard::weights_internal {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "the format is little-endian, and bytes are taken as they are");

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation
constexpr int kMaxDepth = 4;                            // {"name": {"shape": [1
constexpr const char* kMetadata = "__metadata__";

struct Type {
  const char* spelling;
  int bits;
  std::optional<Dtype> dtype;
};
constexpr Type kTypes[] = {
    {"F64", 64, Dtype::float64},
    {"F32", 32, Dtype::float32},
    {"BF16", 16, Dtype::bfloat16},
    {"F16", 16, Dtype::float16},
    {"F8_E4M3", 8, Dtype::float8_e4m3},
    {"F8_E8M0", 8, Dtype::ue8m0},
    {"I64", 64, Dtype::int64},
    {"I32", 32, Dtype::int32},
    {"U8", 8, Dtype::uint8},
    {"BOOL", 8, std::nullopt},
    {"I8", 8, std::nullopt},
    {"I16", 16, std::nullopt},
    {"U16", 16, std::nullopt},
    {"U32", 32, std::nullopt},
    {"U64", 64, std::nullopt},
    {"F8_E5M2", 8, std::nullopt},
    {"F4", 4, std::nullopt},
    {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},
    {"C64", 64, std::nullopt},
};

std::string show(const Json& value) {
  constexpr std::size_t kMaxShown = 40;
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

// Where a fault is, for error texts.
struct Place {
  const std::string& path;
  std::string_view tensor{};

  template <class... Values>
  [[noreturn]] void refuse(fmt::format_string<Values...> text, Values&&... values) const {
    const std::string reason = fmt::format(text, std::forward<Values>(values)...);
    if (tensor.empty()) usage_error("{}: {}; the file is no safetensors file, or damaged: get it again", path, reason);
    usage_error("{}: tensor {}: {}; the file is damaged: get it again", path, show(Json(tensor)), reason);
  }
};

Json parse_json(const Place& place, std::string_view text) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, Json::parse_event_t event, const Json& value) {
    switch (event) {
      case Json::parse_event_t::object_start:
        keys.emplace_back();
        [[fallthrough]];
      case Json::parse_event_t::array_start:
        if (depth >= kMaxDepth) place.refuse("its header is nested deeper than {} levels", kMaxDepth);
        break;
      case Json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!keys.back().insert(value.get<std::string>()).second) place.refuse("its header has the key {} twice", show(value));
        break;
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    place.refuse("its header is no JSON ({})", error.what());
  }
}

std::string_view header_text(const Place& place, std::span<const std::byte> file) {
  if (file.size() < kLengthBytes) place.refuse("it has {} bytes, and a header's length alone takes {}", file.size(), kLengthBytes);
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  if (length > kMaxHeaderBytes) place.refuse("its header would have {} bytes, at most {} are allowed", length, kMaxHeaderBytes);
  if (length > file.size() - kLengthBytes) {
    place.refuse("its header would have {} bytes, and the file ends after {}", length, file.size() - kLengthBytes);
  }
  return {reinterpret_cast<const char*>(file.data()) + kLengthBytes, static_cast<std::size_t>(length)};
}

// A list of numbers >= 0 that fit 63 bits.
std::vector<std::int64_t> sizes_at(const Place& place, const Json& entry, const char* key) {
  const auto found = entry.find(key);
  if (found == entry.end()) place.refuse("lacks \"{}\"", key);
  if (!found->is_array()) place.refuse("{} = {} is no list", key, show(*found));
  std::vector<std::int64_t> sizes;
  for (const Json& value : *found) {
    constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > kMost) place.refuse("{} = {} is no list of sizes", key, show(*found));
    sizes.push_back(value.get<std::int64_t>());
  }
  return sizes;
}

FileTensor tensor_at(const Place& place, const Json& entry, std::span<const std::byte> data) {
  if (!entry.is_object()) place.refuse("its entry is {}, no object", show(entry));
  FileTensor tensor;
  tensor.name = place.tensor;
  const auto type = entry.find("dtype");
  if (type == entry.end() || !type->is_string()) place.refuse("lacks \"dtype\"");
  tensor.type = type->get<std::string>();
  const auto* known = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.spelling == tensor.type; });
  if (known == std::end(kTypes)) place.refuse("dtype {} is unknown", show(*type));
  tensor.dtype = known->dtype;
  tensor.shape = sizes_at(place, entry, "shape");
  const std::vector<std::int64_t> offsets = sizes_at(place, entry, "data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1]) place.refuse("data_offsets = {} are not begin and end", show(entry["data_offsets"]));
  if (offsets[1] > std::ssize(data)) place.refuse("ends at byte {}, and the file has {} bytes of data", offsets[1], data.size());
  const std::optional<std::int64_t> bytes = dense_bytes(tensor.shape, known->bits);
  if (!bytes) place.refuse("shape {} overflows 64 bits", show(entry["shape"]));
  if (*bytes != offsets[1] - offsets[0]) {
    place.refuse("{} of shape {} are {} bytes, and data_offsets {} are {}", tensor.type, show(entry["shape"]), *bytes,
                 show(entry["data_offsets"]), offsets[1] - offsets[0]);
  }
  tensor.bytes = data.subspan(static_cast<std::size_t>(offsets[0]), static_cast<std::size_t>(*bytes));
  return tensor;
}

void read_metadata(const Place& place, const Json& entry, std::map<std::string, std::string>& metadata) {
  if (!entry.is_object()) place.refuse("{} is {}, no object", kMetadata, show(entry));
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) place.refuse("{} of {} is {}, no text", show(Json(key)), kMetadata, show(value));
    metadata[key] = value.get<std::string>();
  }
}

// The format wants every byte of the data in exactly one tensor.
void check_coverage(const Place& file, const std::vector<FileTensor>& tensors, std::span<const std::byte> data) {
  std::vector<const FileTensor*> order;
  for (const FileTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const FileTensor* a, const FileTensor* b) {
    return std::pair(a->bytes.data(), a->bytes.size()) < std::pair(b->bytes.data(), b->bytes.size());
  });
  const std::byte* end = data.data();
  for (const FileTensor* tensor : order) {
    const Place place{file.path, tensor->name};
    if (tensor->bytes.data() < end) place.refuse("begins at byte {}, inside another tensor", tensor->bytes.data() - data.data());
    if (tensor->bytes.data() > end)
      place.refuse("begins at byte {}, and {} bytes before belong to no tensor", tensor->bytes.data() - data.data(),
                   tensor->bytes.data() - end);
    end = tensor->bytes.data() + tensor->bytes.size();
  }
  if (end != data.data() + data.size()) file.refuse("its last {} bytes belong to no tensor", data.data() + data.size() - end);
}

}  // namespace

std::optional<std::int64_t> dense_bytes(const std::vector<std::int64_t>& shape, std::int64_t element_bits) {
  constexpr std::int64_t kMostBits = std::numeric_limits<std::int64_t>::max() - 7;
  std::int64_t bits = element_bits;
  const bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  for (const std::int64_t size : shape) {
    if (size < 0) return std::nullopt;
    if (is_empty) continue;
    if (bits > kMostBits / size) return std::nullopt;
    bits *= size;
  }
  return is_empty ? 0 : (bits + 7) / 8;
}

Header parse_header(const std::string& path, std::span<const std::byte> file) {
  const Place place{path};
  const std::string_view text = header_text(place, file);
  const std::span<const std::byte> data = file.subspan(kLengthBytes + text.size());
  const Json root = parse_json(place, text);
  if (!root.is_object()) place.refuse("its header is {}, no object", show(root));
  Header header;
  for (const auto& [name, entry] : root.items()) {  // ascending
    if (name == kMetadata) {
      read_metadata(place, entry, header.metadata);
    } else {
      header.tensors.push_back(tensor_at({path, name}, entry, data));
    }
  }
  check_coverage(place, header.tensors, data);
  return header;
}

WrittenHeader format_header(const std::vector<TensorPlan>& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json root = nlohmann::ordered_json::object();
  if (!metadata.empty()) root[kMetadata] = metadata;
  WrittenHeader header;
  std::set<std::string> names;
  std::int64_t end = 0;
  for (const TensorPlan& tensor : tensors) {
    if (tensor.name.empty() || tensor.name == kMetadata) usage_error("a tensor is named \"{}\"; the format reserves that", tensor.name);
    if (!names.insert(tensor.name).second) usage_error("tensor {} is planned twice; names are unique", tensor.name);
    const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.dtype == tensor.dtype; });
    TY_ASSERT(type != std::end(kTypes));
    const std::optional<std::int64_t> bytes = dense_bytes(tensor.shape, type->bits);
    if (!bytes || *bytes > std::numeric_limits<std::int64_t>::max() / 2 - end) {
      usage_error("tensor {}: shape {} is negative or too large", tensor.name, nlohmann::json(tensor.shape).dump());
    }
    root[tensor.name] = {{"dtype", type->spelling}, {"shape", tensor.shape}, {"data_offsets", {end, end + *bytes}}};
    header.offsets.push_back(end);
    end += *bytes;
  }
  std::string json = root.dump();
  json.append((kLengthBytes - json.size() % kLengthBytes) % kLengthBytes, ' ');
  const std::uint64_t length = json.size();
  header.bytes.assign(reinterpret_cast<const char*>(&length), kLengthBytes);
  header.bytes += json;
  for (std::int64_t& offset : header.offsets) offset += std::ssize(header.bytes);
  header.file_bytes = std::ssize(header.bytes) + end;
  return header;
}

}  // namespace tokenyard::weights_internal
