// What Python calls: attend for ../plain.py, absorb for ../backends/operators.py.
//
// After a kernel has streamed its tensors through the processor's own caches, whatever runs next is read
// from memory anew: checks in Python then take longer than what they check. Here they are a few hundred
// instructions. Only what a plain call can be is answered; None sends every other, wrong arguments
// included, the general way.

#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "causal.h"
#include "plain.h"
#include "row.h"
#include "sink.h"

namespace {

using stablemask::is_plain;
using stablemask::Sinks;

// Plain tensors, or nothing.
std::optional<std::array<at::Tensor, 3>> read_tensors(PyObject* const* arguments) {
  std::array<at::Tensor, 3> tensors;
  for (int i = 0; i < 3; ++i) {
    if (!THPVariable_CheckExact(arguments[i])) {
      return std::nullopt;
    }
    tensors[i] = THPVariable_Unpack(arguments[i]);
    if (!is_plain(tensors[i])) {
      return std::nullopt;
    }
  }
  return tensors;
}

bool fit(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4 ||
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

// One number for all rows, or a tensor.
struct SinkLogits {
  double number = 0;
  at::Tensor tensor;
};

std::optional<SinkLogits> read_sink_logits(PyObject* object) {
  if (PyFloat_CheckExact(object) && !std::isnan(PyFloat_AS_DOUBLE(object))) {
    return SinkLogits{PyFloat_AS_DOUBLE(object), {}};
  }
  if (!THPVariable_CheckExact(object)) {
    return std::nullopt;
  }
  const at::Tensor tensor = THPVariable_Unpack(object);
  if (!is_plain(tensor) || !at::isFloatingType(tensor.scalar_type()) || tensor.dim() < 2 || tensor.dim() > 3) {
    return std::nullopt;
  }
  return SinkLogits{0, tensor};
}

// Those of a row, by sequence and head; not if a tensor has others.
std::optional<Sinks> of_row(const SinkLogits& sink, const at::Tensor& query) {
  const at::Tensor& tensor = sink.tensor;
  if (!tensor.defined()) {
    return Sinks(1, sink.number);
  }
  const int64_t batch = query.size(0), heads = query.size(1);
  if (!at::is_expandable_to(tensor.sizes(), {batch, heads, 1})) {
    return std::nullopt;
  }
  const int64_t batch_stride = tensor.dim() == 3 && tensor.size(0) > 1 ? tensor.stride(0) : 0;
  const int64_t head_stride = tensor.size(-2) > 1 ? tensor.stride(-2) : 0;
  Sinks sinks(batch * heads);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "of_row", [&] {
    const scalar_t* logits = tensor.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < batch * heads; ++i) {
      sinks[i] = static_cast<double>(logits[i / heads * batch_stride + i % heads * head_stride]);
    }
  });
  return sinks;
}

// ../pseudo.py, log_pseudo_mass.
double log_pseudo_mass(int64_t position, double gamma) {
  return -static_cast<double>(position + 1) * gamma - std::log(-std::expm1(-gamma));
}

// ../pseudo.py, pseudo_logsumexp of the positions from 0 on.
at::Tensor pseudo_logsumexp(int64_t length, double gamma) {
  at::Tensor logits = at::empty({1, 1, length}, at::kFloat);
  float* to = logits.mutable_data_ptr<float>();
  const double first = log_pseudo_mass(0, gamma);
  for (int64_t i = 0; i < length; ++i) {
    to[i] = static_cast<float>(static_cast<double>(i) * -gamma + first);
  }
  return logits;
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

struct Call {
  at::Tensor query, key, value, mask; // the mask may be undefined
  SinkLogits sink;
  std::optional<double> gamma; // in place of the sink
  double scale;
};

std::optional<Call> read_call(PyObject* const* arguments) {
  const auto tensors = read_tensors(arguments);
  if (!tensors || !stablemask::only_autograd_watches()) {
    return std::nullopt;
  }
  const auto& [query, key, value] = *tensors;
  std::optional<double> gamma, scale;
  if (!fit(query, key, value) || !read_number(arguments[4], gamma) ||
      (gamma && !(*gamma > 0 && std::isfinite(*gamma))) || !read_number(arguments[5], scale) ||
      (scale && !std::isfinite(*scale))) {
    return std::nullopt;
  }
  const auto sink = gamma ? SinkLogits() : read_sink_logits(arguments[3]);
  if (!sink) {
    return std::nullopt;
  }
  at::Tensor mask;
  if (arguments[6] != Py_None) {
    if (!THPVariable_CheckExact(arguments[6]) || !is_mask(THPVariable_Unpack(arguments[6]), key)) {
      return std::nullopt;
    }
    mask = THPVariable_Unpack(arguments[6]).expand({key.size(0), 1, 1, key.size(2)});
  }
  return Call{query, key, value, mask, *sink, gamma, scale.value_or(1 / std::sqrt(query.size(3)))};
}

// Without gradients.
at::Tensor attend_row(const Call& call) {
  const auto sinks = call.gamma ? Sinks(1, log_pseudo_mass(call.key.size(2) - 1, *call.gamma))
                                : of_row(call.sink, call.query);
  at::Tensor out;
  if (sinks) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, call.query.scalar_type(), "attend_row", [&] {
      out = stablemask::attend_row<scalar_t>(call.query, call.key, call.value, call.mask, *sinks, call.scale);
    });
  }
  return out;
}

// What was measured of this processor, by dtype; set once, when the library is loaded.
struct Rules {
  double longest_in_float32[2] = {0, 0}; // of bfloat16 and half: keys times head_dim
  double shortest_by_tiles[2] = {INFINITY, INFINITY}; // of float32 and bfloat16: rows
};

Rules rules;

stablemask::Way way(const at::Tensor& query, const at::Tensor& key) {
  const auto dtype = query.scalar_type();
  const bool in_float32 = at::isReducedFloatingType(dtype) &&
      key.size(2) * key.size(3) <= rules.longest_in_float32[dtype == at::kHalf];
  const bool by_tiles =
      query.size(2) >= rules.shortest_by_tiles[dtype != at::kFloat] && stablemask::tiles::fit(query, key);
  return {by_tiles, in_float32};
}

void read_numbers(PyObject* object, double (&numbers)[2]) {
  TORCH_CHECK_TYPE(PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 &&
                       PyFloat_CheckExact(PyTuple_GET_ITEM(object, 0)) && PyFloat_CheckExact(PyTuple_GET_ITEM(object, 1)),
                   "set_rules takes two tuples of two floats");
  for (int i = 0; i < 2; ++i) {
    numbers[i] = PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(object, i));
  }
}

PyObject* set_rules(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "set_rules takes two tuples of two floats");
  Rules read;
  read_numbers(arguments[0], read.longest_in_float32);
  read_numbers(arguments[1], read.shortest_by_tiles);
  rules = read;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// With as many rows as keys.
at::Tensor attend_causally(const Call& call) {
  const auto& [query, key, value, mask, sink, gamma, scale] = call;
  // A scale of 0 or below would make numbers of the -inf that hides later keys.
  if (mask.defined() || value.size(3) != key.size(3) || !(scale >= std::numeric_limits<float>::min()) ||
      (sink.tensor.defined() && !at::is_expandable_to(sink.tensor.sizes(), query.sizes().slice(0, 3)))) {
    return {};
  }
  const bool is_double = query.scalar_type() == at::kDouble;
  // Beyond the range of float it is infinite, which at::full would refuse.
  const double number = is_double ? sink.number : static_cast<double>(static_cast<float>(sink.number));
  const at::Tensor logits = gamma ? pseudo_logsumexp(query.size(2), *gamma)
      : sink.tensor.defined()     ? sink.tensor
                                  : at::full({1, 1, 1}, number, query.options().dtype(is_double ? at::kDouble : at::kFloat));
  const stablemask::Way by = way(query, key);
  const bool differentiable =
      query.requires_grad() || key.requires_grad() || value.requires_grad() || logits.requires_grad();
  if (at::GradMode::is_enabled() && differentiable) {
    return stablemask::Causal::apply(query, key, value, logits, scale, by.by_tiles, by.in_float32);
  }
  return std::get<0>(stablemask::attend_causally(query, key, value, logits, scale, by));
}

PyObject* attend(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "attend takes seven arguments");
  const auto call = read_call(arguments);
  if (!call) {
    Py_RETURN_NONE;
  }
  at::Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    if (call->query.size(2) == 1 && !at::GradMode::is_enabled()) {
      out = attend_row(*call);
    } else if (call->query.size(2) == call->key.size(2)) {
      out = attend_causally(*call);
    }
  }
  if (!out.defined()) {
    Py_RETURN_NONE;
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyObject* absorb(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "absorb takes out, lse, sink_logits");
  const auto tensors = read_tensors(arguments);
  if (!tensors) {
    Py_RETURN_NONE;
  }
  const auto& [out, lse, sink] = *tensors;
  if (out.dim() != 4 || out.stride(3) != 1 || !at::isFloatingType(out.scalar_type()) ||
      lse.scalar_type() != at::toOpMathType(out.scalar_type()) || sink.scalar_type() != lse.scalar_type() ||
      lse.sizes() != out.sizes().slice(0, 3) || sink.dim() != 3 || !at::is_expandable_to(sink.sizes(), lse.sizes())) {
    Py_RETURN_NONE;
  }
  at::Tensor total;
  {
    pybind11::gil_scoped_release no_gil;
    total = stablemask::absorb(out, lse, sink.expand(lse.sizes()));
  }
  return THPVariable_Wrap(std::move(total));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"absorb", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(absorb)), METH_FASTCALL,
     "absorb(out, lse, sink_logits): see stablemask.backends.operators."},
    {"attend", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(attend)), METH_FASTCALL,
     "attend(query, key, value, sink_logits, gamma, scale, attn_mask): see stablemask.plain."},
    {"set_rules", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(set_rules)), METH_FASTCALL,
     "set_rules(longest_in_float32, shortest_by_tiles): see stablemask.native."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods};

} // namespace

PyMODINIT_FUNC PyInit__native() {
  return PyModule_Create(&module);
}
