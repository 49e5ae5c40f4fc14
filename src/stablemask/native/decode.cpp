// What ../decode.py computes, at what its kernel alone costs.
//
// After a kernel has streamed a cache of keys through the processor's own caches, whatever runs next is
// read from memory anew: checks and three small operations in Python then take longer than they compute.
// Here they are a few hundred instructions around PyTorch's kernel. Only what a plain call can be is
// answered; None sends every other, wrong arguments included, the general way.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>

namespace {

// What the processor has for half precision, as ../decode.py tells: AMX, for which the kernel packs keys,
// and AVX-512's products of bfloat16.
bool has_amx = false, has_avx512_bf16 = false;

// How many rows a key head gets for its group of query heads, 0 to leave them apart. See ../decode.py.
int64_t rows_of(int64_t groups, at::ScalarType dtype) {
  if (has_amx) {
    const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
    return groups >= (half ? 4 : 2) ? groups : 0;
  }
  if (groups > 1) {
    return groups;
  }
  return has_avx512_bf16 && dtype == at::kBFloat16 ? 4 : 0;
}

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
  if (query.dim() != 4 || query.size(2) != 1 || key.dim() != 4 || value.sizes() != key.sizes() ||
      query.numel() == 0 || key.numel() == 0) {
    return false;
  }
  const auto dtype = query.scalar_type();
  return key.size(0) == query.size(0) && key.size(3) == query.size(3) && query.size(1) % key.size(1) == 0 &&
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble) &&
      key.scalar_type() == dtype && value.scalar_type() == dtype &&
      // The kernel takes the last axis for contiguous.
      query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1;
}

// Sink logits by sequence and head, or one for all.
using Sinks = c10::SmallVector<double, 64>;

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

// out *= sigmoid(lse - sink), for out (batch, key heads, groups, head_dim) and lse without the last axis.
template <typename scalar_t>
void give_to_sinks(const at::Tensor& out, const at::Tensor& lse, const Sinks& sinks) {
  using real_t = at::opmath_type<scalar_t>;
  const real_t* sums = lse.const_data_ptr<real_t>();
  scalar_t* rows = out.mutable_data_ptr<scalar_t>();
  const int64_t key_heads = out.size(1), groups = out.size(2), head_dim = out.size(3);
  for (int64_t batch = 0, i = 0; batch < out.size(0); ++batch) {
    for (int64_t key_head = 0; key_head < key_heads; ++key_head) {
      for (int64_t group = 0; group < groups; ++group, ++i) {
        const real_t sink = static_cast<real_t>(sinks.size() == 1 ? sinks[0] : sinks[i]);
        const real_t sum = sums[batch * lse.stride(0) + key_head * lse.stride(1) + group * lse.stride(2)];
        const real_t kept = real_t(1) / (real_t(1) + std::exp(sink - sum));
        scalar_t* row = rows + batch * out.stride(0) + key_head * out.stride(1) + group * out.stride(2);
        for (int64_t j = 0; j < head_dim; ++j) {
          row[j] = static_cast<scalar_t>(static_cast<real_t>(row[j]) * kept);
        }
      }
    }
  }
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const Sinks& sinks, std::optional<double> scale) {
  const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3);
  const int64_t key_heads = key.size(1), groups = heads / key_heads;
  const int64_t row_count = rows_of(groups, query.scalar_type());
  at::Tensor rows = query;
  if (groups > 1 && row_count > 0) {
    // The heads that share a key head become its rows, so that each key is read once.
    rows = query.reshape({batch, key_heads, groups, head_dim});
  } else if (row_count > 0) {
    rows = query.repeat({1, 1, row_count, 1});
  }
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      rows, key, value, /*dropout_p=*/0.0, /*is_causal=*/false, /*attn_mask=*/std::nullopt, scale);
  if (groups == 1 && row_count > 0) {
    out = out.narrow(2, 0, 1);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "decode_step", [&] {
    give_to_sinks<scalar_t>(out, lse, sinks);
  });
  return out.reshape({batch, heads, 1, head_dim});
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
  TORCH_CHECK_TYPE(count == 6, "decode_step takes query, key, value, sink_logits, gamma, scale");
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
    out = attend(query, key, value, *sinks, scale);
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

PyObject* set_units(PyObject*, PyObject* arguments) {
  int amx = 0, avx512_bf16 = 0;
  if (!PyArg_ParseTuple(arguments, "pp", &amx, &avx512_bf16)) {
    return nullptr;
  }
  has_amx = amx;
  has_avx512_bf16 = avx512_bf16;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_units", set_units, METH_VARARGS, "set_units(amx, avx512_bf16): what the processor has."},
    {"decode_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(decode_step)), METH_FASTCALL,
     "decode_step(query, key, value, sink_logits, gamma, scale): see stablemask.decode."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode", nullptr, -1, methods};

} // namespace

PyMODINIT_FUNC PyInit__decode() {
  return PyModule_Create(&module);
}
