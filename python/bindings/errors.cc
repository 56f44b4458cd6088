// C++ errors as the exceptions of tokenyard.errors.

#include <nanobind/stl/string.h>

#include "bindings.h"

namespace tokenyard::python {
namespace {

unsigned long main_thread = 0;

nb::object error_class(const char* name) { return nb::module_::import_("tokenyard.errors").attr(name); }

void raise(const char* name, const nb::tuple& arguments) {
  const nb::object type = error_class(name);
  PyErr_SetObject(type.ptr(), type(*arguments).ptr());
}

void translate(const std::exception_ptr& thrown, void* /*payload*/) {
  try {
    std::rethrow_exception(thrown);
  } catch (const UsageError& error) {
    raise("UsageError", nb::make_tuple(error.what()));
  } catch (const TransportError& error) {
    const Failure& failure = error.failure();
    nb::dict fields;
    fields["kind"] = std::string(name(failure.kind));
    fields["phase"] = std::string(name(failure.phase));
    fields["rank"] = failure.rank;
    fields["peer"] = failure.peer;
    fields["epoch"] = failure.epoch;
    fields["expected"] = failure.expected;
    fields["seen"] = failure.seen;
    fields["detail"] = failure.detail;
    raise("TransportError", nb::make_tuple(error.what(), fields));
  } catch (const Error& error) {
    raise("Error", nb::make_tuple(error.what()));
  }
}

}  // namespace

bool is_main_thread() { return PyThread_get_thread_ident() == main_thread; }

bool signal_raised() {
  const nb::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

void bind_errors(nb::module_& /*m*/) {
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  nb::register_exception_translator(translate, nullptr);
}

}  // namespace tokenyard::python
