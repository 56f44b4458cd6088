// Placements as JSON. The text may come from anywhere: every field is checked before it is believed.

#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "core/usage.h"
#include "placement/build.h"

namespace tokenyard {
namespace {

using Json = nlohmann::json;

constexpr int kMaxDepth = 5;  // {"experts": [[{"ranks": [0
constexpr std::size_t kMaxShown = 40;

// A value for an error text, cut short.
std::string show(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

// Refuses what a generic parser lets pass: a key given twice (the last would win), and nesting that no placement has.
class StructureCheck {
 public:
  bool operator()(int depth, Json::parse_event_t event, const Json& value) {
    switch (event) {
      case Json::parse_event_t::object_start:
        keys_.emplace_back();
        [[fallthrough]];
      case Json::parse_event_t::array_start:
        if (depth >= kMaxDepth) usage_error("placement: nested deeper than {} levels; expected ranks and experts only", kMaxDepth);
        break;
      case Json::parse_event_t::object_end:
        keys_.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!keys_.back().insert(value.get<std::string>()).second) usage_error("placement: key {} is given twice", show(value));
        break;
      default:
        break;
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;
};

Json parse(std::string_view text) {
  try {
    return Json::parse(text, StructureCheck());
  } catch (const Json::exception& error) {
    usage_error("placement: not valid JSON: {}", error.what());
  }
}

const Json& object_at(const Json& value, const std::string& place, const std::set<std::string>& known) {
  if (!value.is_object()) usage_error("{} = {}; expected an object", place, show(value));
  for (const auto& [key, ignored] : value.items()) {
    if (known.count(key) == 0) usage_error("{} has the unknown key {}; known: {}", place, show(Json(key)), show(Json(known)));
  }
  return value;
}

const Json& array_at(const Json& object, const std::string& key, const std::string& place) {
  const auto found = object.find(key);
  if (found == object.end()) usage_error("{} lacks the key \"{}\"", place, key);
  if (!found->is_array()) usage_error("{}.{} = {}; expected a list", place, key, show(*found));
  return *found;
}

// Whether a number is in the range of its field is for the builder to say; here it only has to fit an int.
int integer(const Json& value, const std::string& place) {
  constexpr int kMost = std::numeric_limits<int>::max();
  const bool small = value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(kMost)
                                                : value.is_number_integer() && value.get<std::int64_t>() >= -kMost;
  if (!small) usage_error("{} = {}; expected an integer", place, show(value));
  return value.get<int>();
}

Replica replica_from(const Json& value, const std::string& place) {
  Replica replica;
  for (const Json& rank : array_at(object_at(value, place, {"ranks", "share"}), "ranks", place)) {
    replica.shard_ranks.push_back(integer(rank, fmt::format("{}.ranks[{}]", place, replica.shard_ranks.size())));
  }
  const auto share = value.find("share");
  if (share != value.end()) {
    const int number = integer(*share, place + ".share");
    if (number < 1) usage_error("{}.share = {}; a share is in 1..{}", place, number, placement_internal::kMaxShare);
    replica.share = static_cast<std::uint32_t>(number);
  }
  return replica;
}

}  // namespace

Placement Placement::from_json(std::string_view text) {
  const Json root = parse(text);
  object_at(root, "placement", {"ranks", "experts"});
  const Json& experts = array_at(root, "experts", "placement");
  if (!root.contains("ranks")) usage_error("placement lacks the key \"ranks\"");
  const int ranks = integer(root.at("ranks"), "placement.ranks");
  placement_internal::check_sizes(std::ssize(experts), ranks);
  std::vector<std::vector<Replica>> replicas(experts.size());
  for (std::size_t expert = 0; expert < experts.size(); ++expert) {
    const std::string place = fmt::format("placement.experts[{}]", expert);
    if (!experts[expert].is_array()) usage_error("{} = {}; expected a list of replicas", place, show(experts[expert]));
    for (const Json& replica : experts[expert]) {
      replicas[expert].push_back(replica_from(replica, fmt::format("{}[{}]", place, replicas[expert].size())));
    }
  }
  return custom(ranks, replicas);
}

std::string Placement::to_json() const {
  nlohmann::ordered_json root;
  root["ranks"] = ranks();
  root["experts"] = nlohmann::ordered_json::array();
  for (int expert = 0; expert < num_experts(); ++expert) {
    nlohmann::ordered_json& list = root["experts"].emplace_back(nlohmann::ordered_json::array());
    for (const Replica& replica : replicas(expert)) list.push_back({{"ranks", replica.shard_ranks}, {"share", replica.share}});
  }
  return root.dump();
}

}  // namespace tokenyard
