// Names and parsers of the enumerations in tokenyard/options.h.

#include <gtest/gtest.h>

#include "expect_usage_error.h"
#include "tokenyard/options.h"

namespace tokenyard {
namespace {

template <class Enum>
void expect_names(Enum (*parse)(std::string_view), std::initializer_list<std::pair<Enum, const char*>> known) {
  for (const auto& [value, text] : known) {
    EXPECT_EQ(text, name(value));
    EXPECT_EQ(value, parse(text));
  }
}

TEST(OptionNames, EveryEnumerationReadsWhatItWrites) {
  expect_names<Mode>(parse_mode, {{Mode::throughput, "throughput"}, {Mode::latency, "latency"}});
  expect_names<Layout>(parse_layout, {{Layout::token_major, "token_major"},
                                      {Layout::expert_major, "expert_major"},
                                      {Layout::expert_padded, "expert_padded"},
                                      {Layout::rank_slots, "rank_slots"}});
  expect_names<Sizing>(parse_sizing, {{Sizing::exact, "exact"}, {Sizing::capacity, "capacity"}});
  expect_names<Order>(parse_order, {{Order::rank_ascending, "rank_ascending"}, {Order::topk, "topk"}});
  expect_names<Weighting>(parse_weighting, {{Weighting::none, "none"},
                                            {Weighting::at_input, "at_input"},
                                            {Weighting::at_expert, "at_expert"},
                                            {Weighting::at_source, "at_source"}});
  expect_names<Transport>(parse_transport, {{Transport::automatic, "automatic"},
                                            {Transport::inproc, "inproc"},
                                            {Transport::shm, "shm"},
                                            {Transport::mpi, "mpi"},
                                            {Transport::cuda_peer, "cuda_peer"},
                                            {Transport::nccl, "nccl"},
                                            {Transport::nccl_window, "nccl_window"}});
  expect_names<Device>(parse_device, {{Device::cpu, "cpu"}, {Device::cuda, "cuda"}});
  EXPECT_EQ(Transport::automatic, parse_transport("auto"));
}

TEST(OptionNames, AnUnknownTextNamesTheKindAndTheChoices) {
  testing::expect_usage_error([] { parse_mode("fast"); }, {"mode \"fast\"", "throughput, latency"});
  testing::expect_usage_error([] { parse_layout("rows"); }, {"layout \"rows\"", "token_major, expert_major, expert_padded, rank_slots"});
  testing::expect_usage_error([] { parse_sizing(""); }, {"sizing \"\"", "exact, capacity"});
  testing::expect_usage_error([] { parse_order("desc"); }, {"order \"desc\"", "rank_ascending, topk"});
  testing::expect_usage_error([] { parse_weighting("no"); }, {"weighting \"no\"", "none, at_input, at_expert, at_source"});
  testing::expect_usage_error([] { parse_transport("ucx"); },
                              {"transport \"ucx\"", "automatic", "inproc, shm, mpi, cuda_peer, nccl, nccl_window"});
  testing::expect_usage_error([] { parse_device("gpu"); }, {"device \"gpu\"", "cpu, cuda"});
}

}  // namespace
}  // namespace tokenyard
