// What a call must be for C++ to answer it: dense tensors on the CPU, that nobody but autograd follows.

#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

namespace stablemask {
namespace {

// Whether a set holds no key and no backend but those allowed.
bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// No transform, tracer, autocast or mode has a say in what is called.
bool only_autograd_watches() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return within(included, c10::default_included_set) && !at::autocast::is_autocast_enabled(at::kCPU) &&
      !at::impl::torch_function_mode_enabled();
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

} // namespace
} // namespace stablemask
