// The model that the layer is compared with is right about its own gradients: central differences of its forward.

#include "layer/model.h"

#include <gtest/gtest.h>

#include <numeric>

namespace tokenyard::testing {
namespace {

struct Probe {
  const char* what;
  Values* values;
  const Values* gradient;
};

TEST(LayerModel, GradientsAreCentralDifferences) {
  for (const Flavour flavour : kFlavours) {
    SCOPED_TRACE(name(flavour));
    Model model({.flavour = flavour});
    Values x = drawn("x", model.sizes().hidden, 1);
    const Values d_out = drawn("d_out", model.sizes().hidden, 1);
    Values d_x(x.size());
    Parameters d = model.zeros();
    model.backward(x.data(), d_out.data(), d_x.data(), d);
    const std::vector<int> experts = model.choose(x.data()).experts;  // the choice is a constant
    const auto loss = [&] {
      const Values out = model.forward(x.data(), &experts);
      return std::inner_product(out.begin(), out.end(), d_out.begin(), 0.0);
    };
    Parameters& p = model.parameters();
    for (const Probe& probe : {Probe{"x", &x, &d_x}, Probe{"gate", &p.gate, &d.gate}, Probe{"gate_bias", &p.gate_bias, &d.gate_bias},
                               Probe{"w13", &p.experts.w13, &d.experts.w13}, Probe{"w2", &p.experts.w2, &d.experts.w2},
                               Probe{"w13_bias", &p.experts.w13_bias, &d.experts.w13_bias},
                               Probe{"w2_bias", &p.experts.w2_bias, &d.experts.w2_bias}, Probe{"shared w13", &p.shared.w13, &d.shared.w13},
                               Probe{"shared w2", &p.shared.w2, &d.shared.w2}, Probe{"shared gate", &p.shared_gate, &d.shared_gate}}) {
      for (std::size_t i = 0; i < probe.values->size(); ++i) {
        constexpr double kStep = 1e-5;
        const double value = (*probe.values)[i];
        (*probe.values)[i] = value + kStep;
        const double above = loss();
        (*probe.values)[i] = value - kStep;
        const double below = loss();
        (*probe.values)[i] = value;
        ASSERT_NEAR((*probe.gradient)[i], (above - below) / (2 * kStep), 1e-7) << probe.what << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace tokenyard::testing
