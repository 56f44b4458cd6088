#pragma once
// A small MoE feed-forward written naively, in one process and in float64: what the layer must agree with on any number of ranks. It shares
// no code with the library: it draws, routes, cuts weights into shards and differentiates by itself.

#include <cstdint>
#include <string>
#include <vector>

namespace tokenyard::testing {

using Values = std::vector<double>;

enum class Flavour : std::uint8_t {
  qwen,      // softmax over the chosen
  deepseek,  // sigmoid, bias for the choice alone, groups, scaled; shared expert
  gpt_oss,   // softmax over the chosen, biases everywhere, clamped activation
  qwen2,     // softmax over all; shared expert with a sigmoid
  intern,    // as qwen, the best of each group
};
constexpr Flavour kFlavours[] = {Flavour::qwen, Flavour::deepseek, Flavour::gpt_oss, Flavour::qwen2, Flavour::intern};
std::string name(Flavour flavour);

struct ModelSizes {
  Flavour flavour = Flavour::qwen;
  int experts = 6;
  int top_k = 3;
  int groups = 3;  // deepseek keeps two of them, intern takes top_k / groups of each
  std::int64_t hidden = 16;
  std::int64_t width = 8;         // of an expert
  std::int64_t shared_width = 8;  // of the shared one
  bool float8 = false;  // weights but the gate's are such that float8 with a scale for 128 x 128 holds them; the width is a multiple of 128
};

// Tensors of one feed-forward, of E experts: w13 [E,2,I,H], w2 [E,H,I], w13_bias [E,2,I], w2_bias [E,H]; biases may be empty.
struct FeedForward {
  std::int64_t experts = 0, width = 0, hidden = 0;
  Values w13{}, w2{}, w13_bias{}, w2_bias{};
  FeedForward like() const;  // zeros
};
// Experts `chosen`, shard `shard` of `shards`: rows of gate and of up, columns of w2; w2_bias is zero but on shard 0.
FeedForward cut(const FeedForward& whole, const std::vector<int>& chosen, int shards, int shard);
// whole += part, where cut() took it from.
void paste(FeedForward& whole, const FeedForward& part, const std::vector<int>& chosen, int shards, int shard);

// Every parameter, or the gradient of every one.
struct Parameters {
  Values gate, gate_bias;       // [E,H]; [E] or empty: of the logits
  Values selection_bias;        // [E] or empty
  FeedForward experts, shared;  // shared: of one expert, or of none
  Values shared_gate;           // [H] or empty
};

class Model {
 public:
  explicit Model(const ModelSizes& sizes, int seed = 1);
  const ModelSizes& sizes() const { return sizes_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  // The experts of a row, in the order of their slots, and their weights.
  struct Choice {
    std::vector<int> experts;
    Values weights;
  };
  Choice choose(const double* x) const;
  // x [H] -> out [H], by the experts given, or those that it chooses.
  Values forward(const double* x, const std::vector<int>* experts = nullptr) const;
  // Of the loss <d_out, out>: added to d_x [H] and to `d`.
  void backward(const double* x, const double* d_out, double* d_x, Parameters& d) const;
  Parameters zeros() const;

 private:
  Values logits(const double* x) const;
  std::vector<int> select(const Values& logits) const;
  Values weigh(const Values& logits, const std::vector<int>& experts) const;
  Values weights_backward(const Values& logits, const std::vector<int>& experts, const Values& d_weights) const;
  ModelSizes sizes_;
  Parameters parameters_;
};

// Numbers that depend on nothing but what is asked for, in [-scale, scale], each a float32.
Values drawn(const std::string& what, std::int64_t count, double scale);

}  // namespace tokenyard::testing
