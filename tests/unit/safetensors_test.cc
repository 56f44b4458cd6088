// Files in the safetensors format: written, read, and refused.

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <chrono>
#include <cstring>
#include <fstream>

#include "tokenyard/safetensors.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"
#include "unit/temporary_folder.h"
#include "weights/safetensors_header.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;
using testing::read_whole;
using testing::TemporaryFolder;

std::string file_with(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

TEST(Safetensors, ReadsWhatTheFormatSays) {
  const TemporaryFolder folder;
  const std::string path =
      folder.write("a.safetensors", file_with(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,1],)"
                                              R"("data_offsets":[3,7]},"a":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]},)"
                                              R"("none":{"dtype":"F32","shape":[0,4],"data_offsets":[7,7]},)"
                                              R"("one":{"dtype":"I64","shape":[],"data_offsets":[7,15]}}   )",
                                              "abcdefghijklmno"));
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  ASSERT_EQ(file.tensors().size(), 4U);
  const FileTensor* b = file.find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->type, "BF16");
  EXPECT_EQ(b->dtype, Dtype::bfloat16);
  EXPECT_EQ(b->shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(std::memcmp(b->bytes.data(), "defg", b->bytes.size()), 0);
  EXPECT_EQ(file.find("a")->dtype, std::nullopt);
  EXPECT_EQ(file.find("none")->bytes.size(), 0U);
  EXPECT_EQ(file.find("one")->bytes.size(), 8U);
  EXPECT_EQ(file.find("c"), nullptr);
}

TEST(Safetensors, WritesBytesThatTheFormatSays) {
  const TemporaryFolder folder;
  SafetensorsWriter writer(folder.file("w.safetensors"), {{"x", Dtype::float16, {1}}, {"y", Dtype::uint8, {2, 2}}}, {{"format", "pt"}});
  EXPECT_FALSE(std::filesystem::exists(folder.file("w.safetensors")));
  writer.write("y", bytes_of("abcd"));
  writer.write("x", bytes_of("xx"));
  writer.finish();
  const std::string header = R"({"__metadata__":{"format":"pt"},"x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},)"
                             R"("y":{"dtype":"U8","shape":[2,2],"data_offsets":[2,6]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  EXPECT_EQ(read_whole(folder.file("w.safetensors")), file_with(padded, "xxabcd"));
  EXPECT_FALSE(std::filesystem::exists(folder.file("w.safetensors.partial")));
}

TEST(Safetensors, RandomTensorsSurviveTheFile) {
  testing::SeededRandom random;
  const TemporaryFolder folder;
  constexpr Dtype kDtypes[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float8_e4m3,
                               Dtype::ue8m0,   Dtype::int64,   Dtype::int32,    Dtype::uint8};
  for (int round = 0; round < 20; ++round) {
    std::vector<TensorPlan> plan;
    std::map<std::string, std::string> contents;
    for (int i = 0; i < random.between(0, 12); ++i) {
      TensorPlan tensor{"tensor \"" + std::to_string(i * 7 % 13) + "\"\n", random.pick(kDtypes), {}};
      std::int64_t bytes = size_of(tensor.dtype);
      for (int d = 0; d < random.between(0, 5); ++d) {
        tensor.shape.push_back(random.between(0, 4));
        bytes *= tensor.shape.back();
      }
      std::string content;
      for (std::int64_t b = 0; b < bytes; ++b) content.push_back(static_cast<char>(random()));
      contents[tensor.name] = content;
      plan.push_back(std::move(tensor));
    }
    const std::string path = folder.file("random.safetensors");
    SafetensorsWriter writer(path, plan);
    for (const auto& [name, content] : contents) writer.write(name, bytes_of(content));
    writer.finish();
    const SafetensorsFile file = SafetensorsFile::open(path);
    ASSERT_EQ(file.tensors().size(), plan.size());
    for (const TensorPlan& tensor : plan) {
      const FileTensor* read = file.find(tensor.name);
      ASSERT_NE(read, nullptr);
      EXPECT_EQ(read->dtype, tensor.dtype);
      EXPECT_EQ(read->shape, tensor.shape);
      EXPECT_EQ(std::string(reinterpret_cast<const char*>(read->bytes.data()), read->bytes.size()), contents[tensor.name]);
    }
  }
}

// Far more than this machine's memory, and almost all of it a hole: whoever read it all would not come back.
TEST(Safetensors, ReadsOnlyWhatIsTouched) {
  const TemporaryFolder folder;
  const std::string path = folder.file("sparse.safetensors");
  constexpr std::int64_t kElements = std::int64_t{1} << 38;
  const std::string head = file_with(R"({"w":{"dtype":"U8","shape":[274877906944],"data_offsets":[0,274877906944]}})", "");
  folder.write("sparse.safetensors", head);
  std::error_code refused;
  std::filesystem::resize_file(path, head.size() + kElements, refused);
  if (refused) GTEST_SKIP() << "this file system has no sparse files of 256 GiB: " << refused.message();
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(head.size()) + kElements - 3);
  file << "end";
  file.close();
  rusage before{};
  getrusage(RUSAGE_SELF, &before);
  const SafetensorsFile opened = SafetensorsFile::open(path);
  EXPECT_EQ(std::memcmp(opened.find("w")->bytes.data() + kElements - 3, "end", 3), 0);
  rusage after{};
  getrusage(RUSAGE_SELF, &after);
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 64 << 10);  // KiB
}

struct Broken {
  std::string header, data;
  std::initializer_list<std::string_view> parts;
};

TEST(Safetensors, BrokenFilesNameFileTensorAndReason) {
  const TemporaryFolder folder;
  const auto one = [](const std::string& fields) { return "{\"w\": {" + fields + "}}"; };
  const Broken cases[] = {
      {"[]", "", {"its header is []", "no object"}},
      {"{", "", {"its header is no JSON"}},
      {"", "", {"its header is no JSON"}},
      {"{\"w\": 3}", "", {"tensor \"w\"", "its entry is 3"}},
      {one(R"("shape":[1],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "lacks \"dtype\""}},
      {one(R"("dtype":"F33","shape":[1],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "dtype \"F33\" is unknown"}},
      {one(R"("dtype":"F32","data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "lacks \"shape\""}},
      {one(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "shape = 1 is no list"}},
      {one(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "shape = [-1]"}},
      {one(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "shape = [1.5]"}},
      {one(R"("dtype":"F32","shape":[1])"), "abcd", {"tensor \"w\"", "lacks \"data_offsets\""}},
      {one(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), "abcd", {"tensor \"w\"", "data_offsets = [4,0]"}},
      {one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,8])"), "abcd", {"tensor \"w\"", "data_offsets"}},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "abcd", {"tensor \"w\"", "ends at byte 8", "4 bytes of data"}},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "shape [2] are 8 bytes", "are 4"}},
      {one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4])"), "abcd", {"tensor \"w\"", "overflows 64 bits"}},
      {one(R"("dtype":"U8","shape":[2],"data_offsets":[1,3])"), "abc", {"tensor \"w\"", "1 bytes before belong to no tensor"}},
      {one(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), "abc", {"last 1 bytes belong to no tensor"}},
      {R"({"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       "abc",
       {"tensor \"w\"", "begins at byte 1, inside another tensor"}},
      {R"({"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
       "",
       {"key \"w\" twice"}},
      {R"({"__metadata__":{"a":1}})", "", {"\"a\" of __metadata__ is 1"}},
      {R"({"w":{"dtype":"U8","shape":[[[0]]],"data_offsets":[0,0]}})", "", {"nested deeper"}},
  };
  for (const Broken& broken : cases) {
    SCOPED_TRACE(broken.header);
    const std::string path = folder.write("broken.safetensors", file_with(broken.header, broken.data));
    expect_usage_error([&] { SafetensorsFile::open(path); }, {path});
    expect_usage_error([&] { SafetensorsFile::open(path); }, broken.parts);
  }
  expect_usage_error([&] { SafetensorsFile::open(folder.write("short", "1234567")); }, {"short", "7 bytes"});
  expect_usage_error([&] { SafetensorsFile::open(folder.write("empty", "")); }, {"empty", "0 bytes"});
  expect_usage_error([&] { SafetensorsFile::open(folder.write("long", file_with(std::string(90, ' '), "").substr(0, 60))); },
                     {"90 bytes", "ends after 52"});
  expect_usage_error([&] { SafetensorsFile::open(folder.write("huge", std::string(16, '\xff'))); }, {"at most 100000000"});
  expect_usage_error([&] { SafetensorsFile::open(folder.file("absent")); }, {"absent", "cannot be opened", "check the path"});
  expect_usage_error([&] { SafetensorsFile::open(folder.path()); }, {"no regular file"});
}

// Any damage to a good file is refused, or leaves a file whose tensors all lie within it.
TEST(Safetensors, DamagedFilesAreRefusedOrSound) {
  testing::SeededRandom random;
  const std::string good = file_with(R"({"__metadata__":{"a":"b"},"v":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
                                     R"("w":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}})",
                                     std::string(19, 'x'));
  int refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string damaged = good;
    for (int i = 0; i < random.between(1, 3); ++i) {
      const auto at = static_cast<std::size_t>(random.between(0, std::ssize(damaged) - 1));
      if (random.one_in(4)) {
        damaged.resize(at + 1);
      } else if (random.one_in(2)) {
        damaged[at] = static_cast<char>(random());
      } else {
        damaged[at] = damaged[static_cast<std::size_t>(random.between(0, std::ssize(damaged) - 1))];
      }
    }
    try {
      const auto header = weights_internal::parse_header("damaged", bytes_of(damaged));
      std::size_t total = 0;
      for (const FileTensor& tensor : header.tensors) {
        ASSERT_GE(tensor.bytes.data(), bytes_of(damaged).data() + 8);
        ASSERT_LE(tensor.bytes.data() + tensor.bytes.size(), bytes_of(damaged).data() + damaged.size());
        total += tensor.bytes.size();
      }
      ASSERT_LE(total, damaged.size());
    } catch (const UsageError& error) {
      ASSERT_EQ(std::string_view(error.what()).substr(0, 8), "damaged:");
      ++refused;
    }
  }
  EXPECT_GT(refused, 10'000);
}

TEST(SafetensorsWriter, Errors) {
  const TemporaryFolder folder;
  const std::string path = folder.file("w.safetensors");
  {
    SafetensorsWriter writer(path, {{"a", Dtype::uint8, {2}}, {"b", Dtype::uint8, {1}}});
    expect_usage_error([&] { writer.write("c", bytes_of("x")); }, {"tensor c was not planned"});
    expect_usage_error([&] { writer.write("a", bytes_of("x")); }, {"tensor a has 1 bytes, planned were 2"});
    writer.write("a", bytes_of("xy"));
    expect_usage_error([&] { writer.write("a", bytes_of("xy")); }, {"written already"});
    expect_usage_error([&] { writer.finish(); }, {"tensor b was not written"});
    EXPECT_TRUE(std::filesystem::exists(path + ".partial"));
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  expect_usage_error([&] { SafetensorsWriter(path, {{"a", Dtype::uint8, {2}}, {"a", Dtype::uint8, {2}}}); }, {"tensor a is planned twice"});
  expect_usage_error([&] { SafetensorsWriter(path, {{"a", Dtype::uint8, {-2}}}); }, {"tensor a", "[-2]"});
  expect_usage_error([&] { SafetensorsWriter(path, {{"", Dtype::uint8, {2}}}); }, {"reserves"});
  expect_usage_error([&] { SafetensorsWriter(folder.file("no/where"), {}); }, {"no/where", "cannot be created"});
}

TEST(Checkpoint, SeveralFilesAreOne) {
  const TemporaryFolder folder;
  const auto write = [&](const std::string& file, const std::string& tensor, const std::string& content) {
    SafetensorsWriter writer(folder.file(file), {{tensor, Dtype::uint8, {std::ssize(content)}}});
    writer.write(tensor, bytes_of(content));
    writer.finish();
  };
  write("one.safetensors", "model.a", "first");
  write("two.safetensors", "model.b", "second");
  const std::string index = "model.safetensors.index.json";
  folder.write(index, R"({"metadata": {}, "weight_map": {"model.a": "one.safetensors", "model.b": "two.safetensors"}})");
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"model.a", "model.b"}));
  EXPECT_EQ(std::memcmp(checkpoint.tensor("model.b").bytes.data(), "second", 6), 0);
  EXPECT_EQ(checkpoint.file_of("model.a"), folder.file("one.safetensors"));
  EXPECT_FALSE(checkpoint.contains("model.c"));
  expect_usage_error([&] { checkpoint.tensor("model.c"); }, {"tensor model.c: is missing", "there is model.a"});

  folder.write(index, R"({"weight_map": {"model.a": "two.safetensors"}})");
  expect_usage_error([&] { Checkpoint::open(folder.path()); }, {"two.safetensors: tensor model.a is missing"});
  folder.write(index, R"({"weight_map": {"model.a": "../one.safetensors"}})");
  expect_usage_error([&] { Checkpoint::open(folder.path()); }, {"tensor model.a", "../one.safetensors", "same folder"});
  folder.write(index, R"({"weights": {}})");
  expect_usage_error([&] { Checkpoint::open(folder.path()); }, {"weight_map"});
  folder.write(index, "{");
  expect_usage_error([&] { Checkpoint::open(folder.path()); }, {"is no JSON"});
}

TEST(Checkpoint, OneFile) {
  const TemporaryFolder folder;
  SafetensorsWriter writer(folder.file("model.safetensors"), {{"a", Dtype::uint8, {1}}});
  writer.write("a", bytes_of("x"));
  writer.finish();
  for (const std::string& path : {folder.path(), folder.file("model.safetensors")}) {
    EXPECT_EQ(Checkpoint::open(path).names(), std::vector<std::string>{"a"});
  }
  const TemporaryFolder empty;
  expect_usage_error([&] { Checkpoint::open(empty.path()); }, {"model.safetensors", "cannot be opened"});
}

}  // namespace
}  // namespace tokenyard
