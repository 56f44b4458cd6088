#include "tokenyard/norm.h"

#include "collectives.h"
#include "experts.h"

namespace tokenyard::python {
namespace {

using Stream = std::uintptr_t;
void* as_stream(Stream stream) { return reinterpret_cast<void*>(stream); }  // NOLINT(performance-no-int-to-ptr): as torch gives it

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

// A stream is given with tensors on a GPU: the functions of norm.h take it last.
template <class... Stream>
void forward(const Tensors& input, const RmsNorm& norm, const Tensors& output, Stream... stream) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { residual_norm(from, norm, to, as_stream(stream)...); });
}
template <class Held, class... Stream>
void forward_scattered(Held& held, const Tensors& input, const RmsNorm& norm, const Tensors& output, Stream... stream) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { reduce_scatter_norm(*held.collectives, from, norm, to, as_stream(stream)...); });
}
template <class Held, class... Stream>
void forward_gathered(Held& held, const Tensors& input, const RmsNorm& norm, const Tensors& output, Stream... stream) {
  const ResidualInput from = residual_input(input);
  const NormOutput to = norm_output(output);
  waiting([&] { norm_all_gather(*held.collectives, from, norm, to, as_stream(stream)...); });
}

// d: of x and of the weight
template <class... Stream>
void backward(const Tensors& input, const RmsNorm& norm, const Tensors& d, Stream... stream) {
  const NormGradient from = norm_gradient(input);
  const TensorView d_x = writable_or_none(d.at(0)), d_weight = writable_or_none(d.at(1));
  waiting([&] { residual_norm_backward(from, norm, d_x, d_weight, as_stream(stream)...); });
}
// d: of the residual, of the partial sums and of the weight
template <class Held, class... Stream>
void backward_scattered(Held& held, const Tensors& input, const RmsNorm& norm, const Tensors& d, Stream... stream) {
  const NormGradient from = norm_gradient(input);
  const NormOutput to = {writable_or_none(d.at(0)), writable_or_none(d.at(1))};
  const TensorView d_weight = writable_or_none(d.at(2));
  waiting([&] { reduce_scatter_norm_backward(*held.collectives, from, norm, to, d_weight, as_stream(stream)...); });
}
template <class Held, class... Stream>
void backward_gathered(Held& held, const Tensors& input, const RmsNorm& norm, const Tensors& d, Stream... stream) {
  const NormGradient from = norm_gradient(input);
  const TensorView d_x = writable_or_none(d.at(0)), d_weight = writable_or_none(d.at(1));
  waiting([&] { norm_all_gather_backward(*held.collectives, from, norm, d_x, d_weight, as_stream(stream)...); });
}

void bind_norm_on_gpus(nb::module_& m) {
  m.def("residual_norm", forward<Stream>, nb::arg("input"), nb::arg("norm"), nb::arg("output"), nb::arg("stream"));
  m.def("reduce_scatter_norm", forward_scattered<HeldDeviceCollectives, Stream>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"),
        nb::arg("output"), nb::arg("stream"));
  m.def("norm_all_gather", forward_gathered<HeldDeviceCollectives, Stream>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"),
        nb::arg("output"), nb::arg("stream"));
  m.def("residual_norm_backward", backward<Stream>, nb::arg("input"), nb::arg("norm"), nb::arg("d"), nb::arg("stream"));
  m.def("reduce_scatter_norm_backward", backward_scattered<HeldDeviceCollectives, Stream>, nb::arg("collectives"), nb::arg("input"),
        nb::arg("norm"), nb::arg("d"), nb::arg("stream"));
  m.def("norm_all_gather_backward", backward_gathered<HeldDeviceCollectives, Stream>, nb::arg("collectives"), nb::arg("input"),
        nb::arg("norm"), nb::arg("d"), nb::arg("stream"));
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
  m.def("residual_norm", forward<>, nb::arg("input"), nb::arg("norm"), nb::arg("output"));
  m.def("reduce_scatter_norm", forward_scattered<HeldCollectives>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"),
        nb::arg("output"));
  m.def("norm_all_gather", forward_gathered<HeldCollectives>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"), nb::arg("output"));
  m.def("residual_norm_backward", backward<>, nb::arg("input"), nb::arg("norm"), nb::arg("d"));
  m.def("reduce_scatter_norm_backward", backward_scattered<HeldCollectives>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"),
        nb::arg("d"));
  m.def("norm_all_gather_backward", backward_gathered<HeldCollectives>, nb::arg("collectives"), nb::arg("input"), nb::arg("norm"),
        nb::arg("d"));
  bind_norm_on_gpus(m);
}

}  // namespace tokenyard::python
