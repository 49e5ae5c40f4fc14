// What Python calls: decode_step for ../decode.py, absorb for ../backends/operators.py.
//
// After a kernel has streamed its tensors through the processor's own caches, whatever runs next is read
// from memory anew: checks in Python then take longer than what they check. Here they are a few hundred
// instructions. Only what a plain call can be is answered; None sends every other, wrong arguments
// included, the general way.

#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>

#include "row.h"
#include "sink.h"

namespace {

using stablemask::Sinks;

// Whether a set holds no key and no backend but those allowed.
bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// No gradient, transform, tracer, autocast or mode has a say in what is called.
bool nothing_watches() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !at::GradMode::is_enabled() && within(included, c10::default_included_set) &&
      !at::autocast::is_autocast_enabled(at::kCPU) && !at::impl::torch_function_mode_enabled();
}

// A dense tensor on the CPU that is just its memory, without a tangent.
bool is_plain(const at::Tensor& tensor) {
  static const c10::DispatchKeySet dense({
      c10::DispatchKey::CPU,
      c10::DispatchKey::ADInplaceOrView,
      c10::DispatchKey::AutogradCPU,
      c10::DispatchKey::AutocastCPU,
  });
  return tensor.defined() && within(tensor.key_set(), dense) && !tensor._fw_grad(/*level=*/0).defined();
}

bool is_row(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  if (query.dim() != 4 || query.size(2) != 1 || key.dim() != 4 || value.dim() != 4 ||
      value.sizes().slice(0, 3) != key.sizes().slice(0, 3) || query.numel() == 0 || key.numel() == 0 ||
      value.numel() == 0) {
    return false;
  }
  const auto dtype = query.scalar_type();
  return key.size(0) == query.size(0) && key.size(3) == query.size(3) && query.size(1) % key.size(1) == 0 &&
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble) &&
      key.scalar_type() == dtype && value.scalar_type() == dtype &&
      query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1;
}

std::optional<Sinks> sinks_of(const at::Tensor& tensor, const at::Tensor& query) {
  const int64_t batch = query.size(0), heads = query.size(1), axes = tensor.dim();
  if (!is_plain(tensor) || !at::isFloatingType(tensor.scalar_type()) || axes < 2 || axes > 3 ||
      tensor.size(-1) != 1 || (tensor.size(-2) != 1 && tensor.size(-2) != heads) ||
      (axes == 3 && tensor.size(0) != 1 && tensor.size(0) != batch)) {
    return std::nullopt;
  }
  const int64_t batch_stride = axes == 3 && tensor.size(0) > 1 ? tensor.stride(0) : 0;
  const int64_t head_stride = tensor.size(-2) > 1 ? tensor.stride(-2) : 0;
  Sinks sinks(batch * heads);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "sinks_of", [&] {
    const scalar_t* logits = tensor.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < batch * heads; ++i) {
      sinks[i] = static_cast<double>(logits[i / heads * batch_stride + i % heads * head_stride]);
    }
  });
  return sinks;
}

// Of bool: which keys each sequence sees, or all of them see.
bool is_mask(const at::Tensor& mask, const at::Tensor& key) {
  return is_plain(mask) && mask.scalar_type() == at::kBool && mask.dim() == 4 && mask.size(1) == 1 &&
      mask.size(2) == 1 && mask.size(3) == key.size(2) && (mask.size(0) == 1 || mask.size(0) == key.size(0)) &&
      mask.stride(3) == 1;
}

// A float, None, or neither.
bool read_number(PyObject* object, std::optional<double>& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
  }
  return number.has_value() || object == Py_None;
}

PyObject* decode_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "decode_step takes query, key, value, sink_logits, gamma, scale, attn_mask");
  for (int i = 0; i < 3; ++i) {
    if (!THPVariable_CheckExact(arguments[i])) {
      Py_RETURN_NONE;
    }
  }
  const at::Tensor query = THPVariable_Unpack(arguments[0]);
  const at::Tensor key = THPVariable_Unpack(arguments[1]);
  const at::Tensor value = THPVariable_Unpack(arguments[2]);
  if (!nothing_watches() || !is_plain(query) || !is_plain(key) || !is_plain(value) || !is_row(query, key, value)) {
    Py_RETURN_NONE;
  }
  at::Tensor mask;
  if (THPVariable_CheckExact(arguments[6]) && is_mask(THPVariable_Unpack(arguments[6]), key)) {
    mask = THPVariable_Unpack(arguments[6]).expand({key.size(0), 1, 1, key.size(2)});
  } else if (arguments[6] != Py_None) {
    Py_RETURN_NONE;
  }
  std::optional<double> number, gamma, scale;
  if (!read_number(arguments[4], gamma) || !read_number(arguments[5], scale) ||
      (scale && !std::isfinite(*scale))) {
    Py_RETURN_NONE;
  }
  std::optional<Sinks> sinks;
  if (gamma) {
    if (!(*gamma > 0)) {
      Py_RETURN_NONE;
    }
    // ../pseudo.py, log_pseudo_mass, of the last position.
    sinks.emplace(1, -static_cast<double>(key.size(2)) * *gamma - std::log(-std::expm1(-*gamma)));
  } else if (read_number(arguments[3], number) && number) {
    sinks.emplace(1, *number);
  } else if (THPVariable_CheckExact(arguments[3])) {
    sinks = sinks_of(THPVariable_Unpack(arguments[3]), query);
  }
  if (!sinks) {
    Py_RETURN_NONE;
  }
  at::Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "decode_step", [&] {
      out = stablemask::attend<scalar_t>(query, key, value, mask, *sinks, scale.value_or(1 / std::sqrt(query.size(3))));
    });
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyObject* absorb(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "absorb takes out, lse, sink_logits");
  for (int i = 0; i < 3; ++i) {
    if (!THPVariable_Check(arguments[i])) {
      Py_RETURN_NONE;
    }
  }
  const at::Tensor out = THPVariable_Unpack(arguments[0]);
  const at::Tensor lse = THPVariable_Unpack(arguments[1]);
  const at::Tensor sink = THPVariable_Unpack(arguments[2]);
  if (!is_plain(out) || !is_plain(lse) || !is_plain(sink) || out.dim() != 4 || out.stride(3) != 1 ||
      !at::isFloatingType(out.scalar_type()) || lse.scalar_type() != at::toOpMathType(out.scalar_type()) ||
      sink.scalar_type() != lse.scalar_type() || lse.sizes() != out.sizes().slice(0, 3) || sink.dim() != 3 ||
      !at::is_expandable_to(sink.sizes(), lse.sizes())) {
    Py_RETURN_NONE;
  }
  at::Tensor total;
  {
    pybind11::gil_scoped_release no_gil;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "absorb", [&] {
      total = stablemask::absorb<scalar_t>(out, lse, sink.expand(lse.sizes()));
    });
  }
  return THPVariable_Wrap(std::move(total));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"absorb", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(absorb)), METH_FASTCALL,
     "absorb(out, lse, sink_logits): see stablemask.backends.operators."},
    {"decode_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(decode_step)), METH_FASTCALL,
     "decode_step(query, key, value, sink_logits, gamma, scale, attn_mask): see stablemask.decode."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods};

} // namespace

PyMODINIT_FUNC PyInit__native() {
  return PyModule_Create(&module);
}
