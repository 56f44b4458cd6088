#include "collective/lane_arena.h"

namespace tokenyard::collective_internal {
namespace {

// Of an exchange without rows; the lanes lie behind its flags.
protocol::ArenaShape shape_of(const World& world) { return {.ranks = world.size()}; }
protocol::ArenaLayout flags_of(const World& world) {
  return protocol::arena_layout(shape_of(world),
                                {.beacon_bytes = sizeof(protocol::DeviceBeacon), .mailbox_bytes = sizeof(protocol::DeviceMailbox)});
}
protocol::LaneLayout lanes_of(const World& world, const LaneOptions& options) {
  return protocol::LaneLayout::of(world.size(), options.lanes, options.slot_bytes, flags_of(world).total);
}

}  // namespace

LaneArena::LaneArena(const World& world, const LaneOptions& options)
    : DeviceWords(world, flags_of(world),
                  {.transport = options.transport,
                   .nccl_communicator = options.nccl_communicator,
                   .device = options.device,
                   .arena_bytes = lanes_of(world, options).total,
                   .timeout_ms = options.timeout_ms}),
      context_{view(), shape_of(world)},
      lanes_(lanes_of(world, options)) {}

}  // namespace tokenyard::collective_internal
