// Causal attention of as many rows as keys: PyTorch's kernel, what a sink takes of its output, and the gradients,
// those of a row behind a cache too.
//
// The method, and the derivation of its gradients, is in ../stock/operators.py, which does the same in Python
// and for every other call. In short sequences that takes longer than the kernel; here it is a few microseconds.

#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <optional>
#include <tuple>

#include "rules.h"
#include "sink.h"
#include "tiles.h"

namespace stablemask {
namespace {

// Out (B, H, n, D), and lse (B, H, n) with the sink in it; sink is broadcast to that.
std::tuple<at::Tensor, at::Tensor> attend_causally(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value, const at::Tensor& sink, double scale) {
  if (is_faster(FORWARD_BY_TILES, query, query.size(2)) && tiles::serve(query.scalar_type(), query.size(3))) {
    return tiles::attend(query, key, value, sink.to(at::kFloat).expand(query.sizes().slice(0, 3)), scale);
  }
  const auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, /*dropout_p=*/0.0, /*is_causal=*/true, /*attn_mask=*/{}, scale);
  return {out, absorb(out, lse, sink.to(lse.scalar_type()).expand(lse.sizes()))};
}

// Numbers of a query up to which all is converted at once, for to enter another operator would take time that shows.
constexpr int64_t FEW = 1 << 17;

// Of query, key, value and sink_logits; lse is contiguous, and so is the last axis of the others.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiate(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink, const std::optional<at::Tensor>& mask, const at::Tensor& out, const at::Tensor& lse,
    double scale, bool of_sink) {
  const bool is_row = query.size(2) == 1;
  const bool by_tiles = !is_row && is_faster(BACKWARD_BY_TILES, query, query.size(2)) &&
      tiles::serve(query.scalar_type(), query.size(3)) && tiles::has_room(query);
  const bool in_float32 = is_faster(BACKWARD_IN_FLOAT32, query, key.size(2));
  at::Tensor d_query, d_key, d_value, d_sink;
  if (by_tiles) {
    std::tie(d_query, d_key, d_value) = tiles::differentiate(grad, query, key, value, out, lse, scale);
  } else if (in_float32 && query.numel() > FEW && !is_row) {
    // By slices, as ../stock/kernels.py takes them.
    static const auto by_slices = c10::Dispatcher::singleton().findSchemaOrThrow("stablemask::flash_backward", "");
    const c10::IValue none;
    torch::jit::Stack stack{grad, query, key, value, out, lse, none, none, none, none, int64_t(0), scale, "cpu"};
    by_slices.callBoxed(stack);
    std::tie(d_query, d_key, d_value) = std::tuple(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor());
  } else {
    constexpr double INFINITE = std::numeric_limits<double>::infinity();
    at::Tensor sums = lse;
    std::optional<at::Tensor> bias;
    if (mask) {
      bias = at::zeros(mask->sizes(), lse.options()).masked_fill_(mask->logical_not(), -INFINITE);
      // A row that sees nothing has scores of -inf only; any finite lse makes their weights 0.
      sums = lse.masked_fill(lse.eq(-INFINITE), 0.0);
    }
    const auto computed = [&](const at::Tensor& tensor) { return in_float32 ? tensor.to(at::kFloat) : tensor; };
    const auto given = [&](const at::Tensor& tensor) { return tensor.to(query.scalar_type()); };
    const auto found = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        computed(grad), computed(query), computed(key), computed(value), computed(out), sums,
        /*dropout_p=*/0.0, /*is_causal=*/!is_row, bias, scale);
    std::tie(d_query, d_key, d_value) =
        std::tuple(given(std::get<0>(found)), given(std::get<1>(found)), given(std::get<2>(found)));
  }
  if (of_sink) {
    const at::Tensor of_rows = sink_gradient(grad, out, lse, sink.to(lse.scalar_type()).expand(lse.sizes()));
    const at::Tensor summed = sink.size(-1) == 1 ? sum_rows(of_rows) : of_rows;
    d_sink = at::sum_to(summed, sink.sizes()).to(sink.scalar_type());
  } else {
    d_sink = at::empty({0}, sink.options());
  }
  return {d_query, d_key, d_value, d_sink};
}

} // namespace
} // namespace stablemask
