// Causal attention of as many rows as keys: PyTorch's kernel, what a sink takes of its output, and the gradients.
//
// The method, and the derivation of its gradients, is in ../backends/operators.py, which does the same in Python
// and for every other call. In short sequences that takes longer than the kernel; here it is a few microseconds.

#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

#include "plain.h"
#include "sink.h"
#include "tiles.h"

namespace stablemask {
namespace {

// Of query, key and value, and of the sink logits where they are asked for.
struct Gradients {
  at::Tensor query, key, value, sink;
};

// How a call is computed.
struct Way {
  bool by_tiles; // of ours
  bool in_float32; // the backward
};

// Out (B, H, n, D), and lse (B, H, n) with the sink in it; sink is broadcast to that.
std::tuple<at::Tensor, at::Tensor> attend_causally(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value, const at::Tensor& sink, double scale,
                                                   Way way) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (way.by_tiles) {
    return tiles::attend(query, key, value, sink.to(at::kFloat).expand(query.sizes().slice(0, 3)), scale);
  }
  const auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, /*dropout_p=*/0.0, /*is_causal=*/true, /*attn_mask=*/{}, scale);
  return {out, absorb(out, lse, sink.to(lse.scalar_type()).expand(lse.sizes()))};
}

// Numbers of a query up to which entering the operator would take time that shows: all is converted at once instead.
constexpr int64_t FEW = 1 << 17;

// By the operator: of query, key and value.
Gradients differentiate_by_operator(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                                    double scale) {
  static const auto flash_backward = c10::Dispatcher::singleton().findSchemaOrThrow("stablemask::flash_backward", "");
  const c10::IValue none;
  torch::jit::Stack stack{grad, query, key, value, out, lse, none, none, none, none, int64_t(0), scale, "cpu"};
  flash_backward.callBoxed(stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), {}};
}

// By a kernel.
Gradients differentiate(at::Tensor grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const at::Tensor& sink, const at::Tensor& out, const at::Tensor& lse, double scale,
                        Way way, bool of_sink) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (grad.stride(-1) != 1) {
    grad = grad.contiguous();
  }
  Gradients found;
  if (way.by_tiles && tiles::fit(query, key) && tiles::has_room(query, key)) {
    std::tie(found.query, found.key, found.value) = tiles::differentiate(grad, query, key, value, out, lse, scale);
  } else if (way.in_float32 && query.numel() > FEW) {
    found = differentiate_by_operator(grad, query, key, value, out, lse, scale);
  } else {
    const auto computed = [&](const at::Tensor& tensor) { return way.in_float32 ? tensor.to(at::kFloat) : tensor; };
    const auto given = [&](const at::Tensor& tensor) { return tensor.to(query.scalar_type()); };
    const auto [d_query, d_key, d_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        computed(grad), computed(query), computed(key), computed(value), computed(out), lse,
        /*dropout_p=*/0.0, /*is_causal=*/true, /*attn_mask=*/{}, scale);
    found = {given(d_query), given(d_key), given(d_value), {}};
  }
  if (of_sink) {
    const at::Tensor of_rows = sink_gradient(grad, out, lse, sink.to(lse.scalar_type()).expand(lse.sizes()));
    const at::Tensor summed = sink.size(-1) == 1 ? sum_rows(of_rows) : of_rows;
    found.sink = at::sum_to(summed, sink.sizes()).to(sink.scalar_type());
  }
  return found;
}

// By the operator, for whoever watches; the sink's gradient is operations they know.
Gradients differentiate_in_sight(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                                 const at::Tensor& value, const at::Tensor& sink, const at::Tensor& out,
                                 const at::Tensor& lse, double scale, bool of_sink) {
  Gradients found = differentiate_by_operator(grad, query, key, value, out, lse, scale);
  if (of_sink) {
    const auto dtype = lse.scalar_type();
    const at::Tensor d_total = -(grad.to(dtype) * out.to(dtype)).sum(-1);
    const at::Tensor share = (sink.to(dtype) - lse).exp().nan_to_num(/*nan=*/1.0);
    found.sink = at::sum_to(share * d_total, sink.sym_sizes()).to(sink.scalar_type());
  }
  return found;
}

// The numbers of Way are arguments, for this function takes no other.
struct Causal : torch::autograd::Function<Causal> {
  static constexpr bool is_traceable = true; // by compiled autograd, which shall see the operator

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const at::Tensor& sink, double scale, bool by_tiles,
                            bool in_float32) {
    const auto [out, lse] = attend_causally(query, key, value, sink, scale, {by_tiles, in_float32});
    context->save_for_backward({query, key, value, sink, out, lse});
    context->saved_data["scale"] = scale;
    context->saved_data["by_tiles"] = by_tiles;
    context->saved_data["in_float32"] = in_float32;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) {
      return torch::autograd::variable_list(7);
    }
    const auto saved = context->get_saved_variables();
    const at::Tensor &query = saved[0], &key = saved[1], &value = saved[2], &sink = saved[3], &out = saved[4], &lse = saved[5];
    const double scale = context->saved_data["scale"].toDouble();
    const bool of_sink = context->needs_input_grad(3);
    const bool alone = !at::GradMode::is_enabled() && only_autograd_watches() && is_plain(grad);
    const Way way{context->saved_data["by_tiles"].toBool(), context->saved_data["in_float32"].toBool()};
    const Gradients found = alone
        ? differentiate(grad, query, key, value, sink, out, lse, scale, way, of_sink)
        : differentiate_in_sight(grad, query, key, value, sink, out, lse, scale, of_sink);
    return {found.query, found.key, found.value, found.sink, {}, {}, {}};
  }
};

} // namespace
} // namespace stablemask
