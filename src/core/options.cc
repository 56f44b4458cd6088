#include "tokenyard/options.h"

#include "core/name_table.h"

namespace tokenyard {
namespace {

constexpr NamedValue<Mode> kModes[] = {{Mode::throughput, "throughput"}, {Mode::latency, "latency"}};
constexpr NamedValue<Layout> kLayouts[] = {
    {Layout::token_major, "token_major"},
    {Layout::expert_major, "expert_major"},
    {Layout::expert_padded, "expert_padded"},
    {Layout::rank_slots, "rank_slots"},
};
constexpr NamedValue<Sizing> kSizings[] = {{Sizing::exact, "exact"}, {Sizing::capacity, "capacity"}};
constexpr NamedValue<Order> kOrders[] = {{Order::rank_ascending, "rank_ascending"}, {Order::topk, "topk"}};
constexpr NamedValue<Weighting> kWeightings[] = {
    {Weighting::none, "none"},
    {Weighting::at_input, "at_input"},
    {Weighting::at_expert, "at_expert"},
    {Weighting::at_source, "at_source"},
};
constexpr NamedValue<Transport> kTransports[] = {
    {Transport::automatic, "automatic"},
    {Transport::automatic, "auto"},
    {Transport::inproc, "inproc"},
    {Transport::shm, "shm"},
    {Transport::mpi, "mpi"},
    {Transport::cuda_peer, "cuda_peer"},
    {Transport::nccl, "nccl"},
    {Transport::nccl_window, "nccl_window"},
};
constexpr NamedValue<Device> kDevices[] = {{Device::cpu, "cpu"}, {Device::cuda, "cuda"}};

}  // namespace

std::string_view name(Mode mode) { return name_in(kModes, mode); }
std::string_view name(Layout layout) { return name_in(kLayouts, layout); }
std::string_view name(Sizing sizing) { return name_in(kSizings, sizing); }
std::string_view name(Order order) { return name_in(kOrders, order); }
std::string_view name(Weighting weighting) { return name_in(kWeightings, weighting); }
std::string_view name(Transport transport) { return name_in(kTransports, transport); }
std::string_view name(Device device) { return name_in(kDevices, device); }

Mode parse_mode(std::string_view text) { return parse_in(kModes, "mode", text); }
Layout parse_layout(std::string_view text) { return parse_in(kLayouts, "layout", text); }
Sizing parse_sizing(std::string_view text) { return parse_in(kSizings, "sizing", text); }
Order parse_order(std::string_view text) { return parse_in(kOrders, "order", text); }
Weighting parse_weighting(std::string_view text) { return parse_in(kWeightings, "weighting", text); }
Transport parse_transport(std::string_view text) { return parse_in(kTransports, "transport", text); }
Device parse_device(std::string_view text) { return parse_in(kDevices, "device", text); }

}  // namespace tokenyard
