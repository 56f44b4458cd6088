#include "layer/model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tokenyard::testing {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double dot(const double* a, const double* b, std::int64_t count) { return std::inner_product(a, a + count, b, 0.0); }

FeedForward drawn_feed_forward(const std::string& what, std::int64_t experts, std::int64_t width, std::int64_t hidden, bool has_bias) {
  FeedForward f = {.experts = experts, .width = width, .hidden = hidden};
  f.w13 = drawn(what + " w13", experts * 2 * width * hidden, 0.5);
  f.w2 = drawn(what + " w2", experts * hidden * width, 0.5);
  if (has_bias) f.w13_bias = drawn(what + " w13_bias", experts * 2 * width, 0.3);
  if (has_bias) f.w2_bias = drawn(what + " w2_bias", experts * hidden, 0.3);
  return f;
}

// The nearest number with three bits behind the first, and none below 2^-9.
double nearest_float8(double value) {
  const double step = std::exp2(std::max(std::ilogb(value), -6) - 3);
  return value == 0 ? 0 : std::nearbyint(value / step) * step;
}

// Matrices of numbers in [-0.5, 0.5], to float8 of up to 256 times a power of two, which is another one in the block beside.
void make_float8(Values& values, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kBlock = 128;
  for (std::int64_t i = 0; i < std::ssize(values); ++i) {
    const std::int64_t block = i / columns % rows / kBlock + i % columns / kBlock;
    values[i] = nearest_float8(values[i] * 512) * std::exp2(-9 - block % 3);
  }
}

// The activation, and its derivatives by gate and up.
struct Activated {
  double value, d_gate, d_up;
};
Activated activate(bool clamped, double gate, double up) {
  if (!clamped) {
    const double s = sigmoid(gate);
    return {gate * s * up, up * (s + gate * s * (1 - s)), gate * s};
  }
  const double g = std::min(gate, 7.0);
  const double u = std::clamp(up, -7.0, 7.0) + 1;
  const double s = sigmoid(1.702 * g);
  return {g * s * u, gate > 7 ? 0 : u * (s + g * 1.702 * s * (1 - s)), up > 7 || up < -7 ? 0 : g * s};
}

// One expert on one row: y [H]; with d_y also the gradients, scaled by `factor`.
struct OneRow {
  const double* x;
  const double* d_y = nullptr;
  double factor = 1;
};
Values run_expert(const FeedForward& f, std::int64_t e, bool clamped, const OneRow& row, double* d_x, FeedForward* d) {
  Values y(static_cast<std::size_t>(f.hidden), 0);
  for (std::int64_t h = 0; h < f.hidden && !f.w2_bias.empty(); ++h) {
    y[h] = f.w2_bias[e * f.hidden + h];
    if (d != nullptr) d->w2_bias[e * f.hidden + h] += row.factor * row.d_y[h];
  }
  for (std::int64_t i = 0; i < f.width; ++i) {
    const std::int64_t gate_at = (e * 2 * f.width + i) * f.hidden;
    const std::int64_t up_at = gate_at + f.width * f.hidden;
    double gate = dot(&f.w13[gate_at], row.x, f.hidden), up = dot(&f.w13[up_at], row.x, f.hidden);
    if (!f.w13_bias.empty()) gate += f.w13_bias[e * 2 * f.width + i], up += f.w13_bias[e * 2 * f.width + f.width + i];
    const Activated a = activate(clamped, gate, up);
    double d_a = 0;
    for (std::int64_t h = 0; h < f.hidden; ++h) {
      const std::int64_t at = (e * f.hidden + h) * f.width + i;
      y[h] += f.w2[at] * a.value;
      if (d == nullptr) continue;
      d_a += row.factor * row.d_y[h] * f.w2[at];
      d->w2[at] += row.factor * row.d_y[h] * a.value;
    }
    if (d == nullptr) continue;
    if (!f.w13_bias.empty()) d->w13_bias[e * 2 * f.width + i] += d_a * a.d_gate, d->w13_bias[e * 2 * f.width + f.width + i] += d_a * a.d_up;
    for (std::int64_t h = 0; h < f.hidden; ++h) {
      d->w13[gate_at + h] += d_a * a.d_gate * row.x[h];
      d->w13[up_at + h] += d_a * a.d_up * row.x[h];
      d_x[h] += d_a * (a.d_gate * f.w13[gate_at + h] + a.d_up * f.w13[up_at + h]);
    }
  }
  return y;
}

// The `count` best of `from`, best first.
std::vector<int> best(const Values& scores, std::vector<int> from, int count) {
  std::stable_sort(from.begin(), from.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  from.resize(std::min(from.size(), static_cast<std::size_t>(count)));
  return from;
}

std::vector<int> range(int begin, int end) {
  std::vector<int> all(static_cast<std::size_t>(end - begin));
  std::iota(all.begin(), all.end(), begin);
  return all;
}

// fn(element of whole, element of part) for every element that cut() takes.
template <class Whole, class Part, class Fn>
void for_each_cut(Whole& whole, Part& part, const std::vector<int>& chosen, int shards, int shard, Fn&& fn) {
  const std::int64_t width = whole.width / shards;
  for (std::int64_t l = 0; l < std::ssize(chosen); ++l) {
    const std::int64_t e = chosen[l];
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t from = shard * width + i;
      for (int p = 0; p < 2; ++p) {
        for (std::int64_t h = 0; h < whole.hidden; ++h)
          fn(whole.w13[((e * 2 + p) * whole.width + from) * whole.hidden + h], part.w13[((l * 2 + p) * width + i) * whole.hidden + h]);
        if (!whole.w13_bias.empty()) fn(whole.w13_bias[(e * 2 + p) * whole.width + from], part.w13_bias[(l * 2 + p) * width + i]);
      }
      for (std::int64_t h = 0; h < whole.hidden; ++h)
        fn(whole.w2[(e * whole.hidden + h) * whole.width + from], part.w2[(l * whole.hidden + h) * width + i]);
    }
    for (std::int64_t h = 0; h < whole.hidden && !whole.w2_bias.empty() && shard == 0; ++h)
      fn(whole.w2_bias[e * whole.hidden + h], part.w2_bias[l * whole.hidden + h]);
  }
}

}  // namespace

std::string name(Flavour flavour) {
  constexpr const char* kNames[] = {"qwen", "deepseek", "gpt_oss", "qwen2", "intern"};
  return kNames[static_cast<int>(flavour)];
}

Values drawn(const std::string& what, std::int64_t count, double scale) {
  std::uint64_t state = 0xcbf29ce484222325;
  for (const char c : what) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    value = static_cast<float>((static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-52 - 1) * scale);
  }
  return values;
}

FeedForward FeedForward::like() const {
  return {experts, width, hidden, Values(w13.size()), Values(w2.size()), Values(w13_bias.size()), Values(w2_bias.size())};
}

FeedForward cut(const FeedForward& whole, const std::vector<int>& chosen, int shards, int shard) {
  const std::int64_t n = std::ssize(chosen), width = whole.width / shards;
  FeedForward part = {n, width, whole.hidden, Values(n * 2 * width * whole.hidden), Values(n * whole.hidden * width), {}, {}};
  if (!whole.w13_bias.empty()) part.w13_bias.resize(n * 2 * width);
  if (!whole.w2_bias.empty()) part.w2_bias.resize(n * whole.hidden);
  for_each_cut(whole, part, chosen, shards, shard, [](double from, double& to) { to = from; });
  return part;
}

void paste(FeedForward& whole, const FeedForward& part, const std::vector<int>& chosen, int shards, int shard) {
  for_each_cut(whole, part, chosen, shards, shard, [](double& to, double from) { to += from; });
}

Model::Model(const ModelSizes& sizes, int seed) : sizes_(sizes) {
  const std::string prefix = std::to_string(seed) + " ";
  const bool is_gpt = sizes.flavour == Flavour::gpt_oss;
  const bool has_shared = sizes.flavour == Flavour::deepseek || sizes.flavour == Flavour::qwen2;
  parameters_.gate = drawn(prefix + "gate", sizes.experts * sizes.hidden, 0.8);
  if (is_gpt) parameters_.gate_bias = drawn(prefix + "gate_bias", sizes.experts, 0.5);
  if (sizes.flavour == Flavour::deepseek) parameters_.selection_bias = drawn(prefix + "selection_bias", sizes.experts, 0.3);
  parameters_.experts = drawn_feed_forward(prefix + "experts", sizes.experts, sizes.width, sizes.hidden, is_gpt);
  parameters_.shared = drawn_feed_forward(prefix + "shared", has_shared ? 1 : 0, sizes.shared_width, sizes.hidden, false);
  if (sizes.flavour == Flavour::qwen2) parameters_.shared_gate = drawn(prefix + "shared_gate", sizes.hidden, 0.5);
  if (!sizes.float8) return;
  make_float8(parameters_.experts.w13, sizes.width, sizes.hidden);
  make_float8(parameters_.experts.w2, sizes.hidden, sizes.width);
  make_float8(parameters_.shared.w13, sizes.shared_width, sizes.hidden);
  make_float8(parameters_.shared.w2, sizes.hidden, sizes.shared_width);
  for (double& weight : parameters_.gate) weight = std::nearbyint(weight * 128) / 128;  // so that the choice hangs on no rounding
}

Parameters Model::zeros() const {
  const Parameters& p = parameters_;
  return {Values(p.gate.size()), Values(p.gate_bias.size()), {}, p.experts.like(), p.shared.like(), Values(p.shared_gate.size())};
}

Values Model::logits(const double* x) const {
  Values logits;
  for (std::int64_t e = 0; e < sizes_.experts; ++e) {
    logits.push_back(dot(&parameters_.gate[e * sizes_.hidden], x, sizes_.hidden));
    if (!parameters_.gate_bias.empty()) logits.back() += parameters_.gate_bias[e];
  }
  return logits;
}

std::vector<int> Model::select(const Values& logits) const {
  const int per_group = sizes_.experts / sizes_.groups;
  if (sizes_.flavour == Flavour::intern) {
    std::vector<int> chosen;
    for (int g = 0; g < sizes_.groups; ++g) {
      for (const int e : best(logits, range(g * per_group, (g + 1) * per_group), sizes_.top_k / sizes_.groups)) chosen.push_back(e);
    }
    return best(logits, chosen, sizes_.top_k);
  }
  if (sizes_.flavour != Flavour::deepseek) return best(logits, range(0, sizes_.experts), sizes_.top_k);
  Values biased, of_groups;
  for (int e = 0; e < sizes_.experts; ++e) biased.push_back(sigmoid(logits[e]) + parameters_.selection_bias[e]);
  for (int g = 0; g < sizes_.groups; ++g) {
    const std::vector<int> two = best(biased, range(g * per_group, (g + 1) * per_group), 2);
    of_groups.push_back(biased[two[0]] + biased[two[1]]);
  }
  std::vector<int> eligible;
  for (const int g : best(of_groups, range(0, sizes_.groups), 2)) {
    for (int e = g * per_group; e < (g + 1) * per_group; ++e) eligible.push_back(e);
  }
  std::sort(eligible.begin(), eligible.end());
  return best(biased, eligible, sizes_.top_k);
}

Values Model::weigh(const Values& logits, const std::vector<int>& experts) const {
  Values weights;
  double sum = 0;
  for (const int e : experts) {
    weights.push_back(sizes_.flavour == Flavour::deepseek ? sigmoid(logits[e]) : std::exp(logits[e]));
    sum += weights.back();
  }
  if (sizes_.flavour == Flavour::qwen2) {
    sum = 0;
    for (const double logit : logits) sum += std::exp(logit);
  }
  for (double& weight : weights) weight *= (sizes_.flavour == Flavour::deepseek ? 2.5 : 1) / sum;
  return weights;
}

// d logits [E] by the quotient rule: w_k = scale * f_k / sum over some set of f.
Values Model::weights_backward(const Values& logits, const std::vector<int>& experts, const Values& d_weights) const {
  const bool is_sigmoid = sizes_.flavour == Flavour::deepseek;
  const double scale = is_sigmoid ? 2.5 : 1;
  Values d(logits.size(), 0);
  std::vector<int> in_sum = sizes_.flavour == Flavour::qwen2 ? range(0, sizes_.experts) : experts;
  const auto f = [&](int e) { return is_sigmoid ? sigmoid(logits[e]) : std::exp(logits[e]); };
  const auto slope = [&](int e) { return is_sigmoid ? f(e) * (1 - f(e)) : f(e); };
  double sum = 0;
  for (const int e : in_sum) sum += f(e);
  for (std::size_t k = 0; k < experts.size(); ++k) {
    d[experts[k]] += d_weights[k] * scale * slope(experts[k]) / sum;
    for (const int e : in_sum) d[e] -= d_weights[k] * scale * f(experts[k]) * slope(e) / (sum * sum);
  }
  return d;
}

Model::Choice Model::choose(const double* x) const {
  const Values l = logits(x);
  const std::vector<int> experts = select(l);
  return {experts, weigh(l, experts)};
}

Values Model::forward(const double* x, const std::vector<int>* experts) const {
  const Values l = logits(x);
  const std::vector<int> chosen = experts == nullptr ? select(l) : *experts;
  const Values weights = weigh(l, chosen);
  const bool clamped = sizes_.flavour == Flavour::gpt_oss;
  Values out(static_cast<std::size_t>(sizes_.hidden), 0);
  for (std::size_t k = 0; k < chosen.size(); ++k) {
    const Values y = run_expert(parameters_.experts, chosen[k], clamped, {x}, nullptr, nullptr);
    for (std::size_t h = 0; h < out.size(); ++h) out[h] += weights[k] * y[h];
  }
  if (parameters_.shared.experts == 0) return out;
  const Values y = run_expert(parameters_.shared, 0, false, {x}, nullptr, nullptr);
  const double score = parameters_.shared_gate.empty() ? 1 : sigmoid(dot(parameters_.shared_gate.data(), x, sizes_.hidden));
  for (std::size_t h = 0; h < out.size(); ++h) out[h] += score * y[h];
  return out;
}

void Model::backward(const double* x, const double* d_out, double* d_x, Parameters& d) const {
  const Values l = logits(x);
  const Choice choice = choose(x);
  const bool clamped = sizes_.flavour == Flavour::gpt_oss;
  Values d_weights;
  for (std::size_t k = 0; k < choice.experts.size(); ++k) {
    const Values y = run_expert(parameters_.experts, choice.experts[k], clamped, {x, d_out, choice.weights[k]}, d_x, &d.experts);
    d_weights.push_back(dot(y.data(), d_out, sizes_.hidden));
  }
  const Values d_logits = weights_backward(l, choice.experts, d_weights);
  for (std::int64_t e = 0; e < sizes_.experts; ++e) {
    if (!d.gate_bias.empty()) d.gate_bias[e] += d_logits[e];
    for (std::int64_t h = 0; h < sizes_.hidden; ++h) {
      d.gate[e * sizes_.hidden + h] += d_logits[e] * x[h];
      d_x[h] += d_logits[e] * parameters_.gate[e * sizes_.hidden + h];
    }
  }
  if (parameters_.shared.experts == 0) return;
  const bool has_gate = !parameters_.shared_gate.empty();
  const double score = has_gate ? sigmoid(dot(parameters_.shared_gate.data(), x, sizes_.hidden)) : 1;
  const Values y = run_expert(parameters_.shared, 0, false, {x, d_out, score}, d_x, &d.shared);
  const double d_logit = dot(y.data(), d_out, sizes_.hidden) * score * (1 - score);
  for (std::int64_t h = 0; h < sizes_.hidden && has_gate; ++h) {
    d.shared_gate[h] += d_logit * x[h];
    d_x[h] += d_logit * parameters_.shared_gate[h];
  }
}

}  // namespace tokenyard::testing
