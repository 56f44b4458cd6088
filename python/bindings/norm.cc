#include "tokenyard/norm.h"

#include "collectives.h"
#include "experts.h"

namespace tokenyard::python {
namespace {

// x, residual, bias
ResidualInput residual_input(const Tensors& tensors) {
  return {view_or_none(tensors.at(0)), view_or_none(tensors.at(1)), view_or_none(tensors.at(2))};
}
// residual, out, inverse
NormOutput norm_output(const Tensors& tensors) {
  return {writable_or_none(tensors.at(0)), writable_or_none(tensors.at(1)), writable_or_none(tensors.at(2))};
}
// residual, d_residual, d_out, inverse
NormGradient norm_gradient(const Tensors& tensors) {
  return {view_or_none(tensors.at(0)), view_or_none(tensors.at(1)), view_or_none(tensors.at(2)), view_or_none(tensors.at(3))};
}

void forward(const Tensors& input, const RmsNorm& norm, const Tensors& output) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { residual_norm(from, norm, to); });
}
void forward_scattered(HeldCollectives& held, const Tensors& input, const RmsNorm& norm, const Tensors& output) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { reduce_scatter_norm(*held.collectives, from, norm, to); });
}
void forward_gathered(HeldCollectives& held, const Tensors& input, const RmsNorm& norm, const Tensors& output) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { norm_all_gather(*held.collectives, from, norm, to); });
}

// d: of x and of the weight
void backward(const Tensors& input, const RmsNorm& norm, const Tensors& d) {
  const NormGradient from = norm_gradient(input);
  const TensorView d_x = writable_or_none(d.at(0)), d_weight = writable_or_none(d.at(1));
  waiting([&] { residual_norm_backward(from, norm, d_x, d_weight); });
}
// d: of the residual, of the partial sums and of the weight
void backward_scattered(HeldCollectives& held, const Tensors& input, const RmsNorm& norm, const Tensors& d) {
  const NormGradient from = norm_gradient(input);
  const NormOutput to = {writable_or_none(d.at(0)), writable_or_none(d.at(1))};
  const TensorView d_weight = writable_or_none(d.at(2));
  waiting([&] { reduce_scatter_norm_backward(*held.collectives, from, norm, to, d_weight); });
}
void backward_gathered(HeldCollectives& held, const Tensors& input, const RmsNorm& norm, const Tensors& d) {
  const NormGradient from = norm_gradient(input);
  const TensorView d_x = writable_or_none(d.at(0)), d_weight = writable_or_none(d.at(1));
  waiting([&] { norm_all_gather_backward(*held.collectives, from, norm, d_x, d_weight); });
}

}  // namespace

void bind_norm(nb::module_& m) {
  nb::class_<RmsNorm>(m, "RmsNorm", "A view only: the caller keeps the weight.")
      .def(
          "__init__",
          [](RmsNorm* self, const Tensor& weight, float epsilon) {
            new (self) RmsNorm{weight.view(), epsilon};
          },
          nb::arg("weight"), nb::arg("epsilon"));
  m.def("slice_counts", slice_counts, nb::arg("tokens"), nb::arg("ranks"));
  m.def("residual_norm", forward, nb::arg("input"), nb::arg("norm"), nb::arg("output"));
  m.def("reduce_scatter_norm", forward_scattered, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"), nb::arg("output"));
  m.def("norm_all_gather", forward_gathered, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"), nb::arg("output"));
  m.def("residual_norm_backward", backward, nb::arg("input"), nb::arg("norm"), nb::arg("d"));
  m.def("reduce_scatter_norm_backward", backward_scattered, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"), nb::arg("d"));
  m.def("norm_all_gather_backward", backward_gathered, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"), nb::arg("d"));
}

}  // namespace tokenyard::python
