// A sink's share taken out of what a kernel has returned, and the sink's gradient: each one pass over the output,
// where separate operations take seven.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace stablemask {
namespace {

constexpr int64_t ROWS = 64; // of each head, at a time

// out *= sigmoid(lse - sink), and the result is logaddexp(lse, sink). Out is (B, H, n, D), its last axis
// contiguous; lse is (B, H, n), the sink broadcast to it, both in the precision the kernel sums in.
template <typename scalar_t>
at::Tensor absorb_in(const at::Tensor& out, const at::Tensor& lse, const at::Tensor& sink) {
  using real_t = at::opmath_type<scalar_t>;
  using lanes_t = at::vec::Vectorized<real_t>;
  const int64_t heads = out.size(1), length = out.size(2), head_dim = out.size(3);
  const int64_t blocks = at::ceil_div(length, ROWS);
  at::Tensor total = at::empty(lse.sizes(), lse.options());
  scalar_t* outs = out.mutable_data_ptr<scalar_t>();
  real_t* totals = total.mutable_data_ptr<real_t>();
  const real_t *lses = lse.const_data_ptr<real_t>(), *sinks = sink.const_data_ptr<real_t>();
  // In the order of memory: rows of a head, or heads of a row.
  const bool by_head = out.stride(1) > out.stride(2);

  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (ROWS * heads * head_dim));
  at::parallel_for(0, out.size(0) * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<real_t> kept(heads * ROWS);
    real_t sums[ROWS], taken[ROWS];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, first = i % blocks * ROWS, count = std::min(ROWS, length - first);
      scalar_t* block = outs + b * out.stride(0) + first * out.stride(2);
      const auto scale = [&](int64_t h, int64_t row) {
        const lanes_t factor(kept[h * ROWS + row]);
        scalar_t* at = block + h * out.stride(1) + row * out.stride(2);
        at::vec::map<scalar_t>([factor](lanes_t x) { return x * factor; }, at, at, head_dim);
      };
      for (int64_t h = 0; h < heads; ++h) {
        const real_t* from = lses + b * lse.stride(0) + h * lse.stride(1) + first * lse.stride(2);
        const real_t* sink_from = sinks + b * sink.stride(0) + h * sink.stride(1) + first * sink.stride(2);
        for (int64_t row = 0; row < count; ++row) {
          sums[row] = from[row * lse.stride(2)];
          taken[row] = sink_from[row * sink.stride(2)];
        }
        real_t* to = totals + (b * heads + h) * length + first;
        for (int64_t row = 0; row < count; row += lanes_t::size()) {
          const int64_t left = std::min<int64_t>(lanes_t::size(), count - row);
          const auto sum = lanes_t::loadu(sums + row, left), other = lanes_t::loadu(taken + row, left);
          const auto less = (sum - other).abs().neg().exp(); // the lesser of the two over the larger
          const auto share = lanes_t::blendv(less, lanes_t(1), sum >= other) / (lanes_t(1) + less);
          share.store(kept.data() + h * ROWS + row, left);
          (at::vec::maximum(sum, other) + less.log1p()).store(to + row, left);
        }
        for (int64_t row = 0; by_head && row < count; ++row) {
          scale(h, row);
        }
      }
      for (int64_t row = 0; !by_head && row < count; ++row) {
        for (int64_t h = 0; h < heads; ++h) {
          scale(h, row);
        }
      }
    }
  });
  return total;
}

at::Tensor absorb(const at::Tensor& out, const at::Tensor& lse, const at::Tensor& sink) {
  at::Tensor total;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "absorb", [&] {
    total = absorb_in<scalar_t>(out, lse, sink);
  });
  return total;
}

// The gradient of a row's sink logit, (B, H, n): -exp(sink - lse) * rowsum(grad * out), with the sink in lse.
template <typename scalar_t>
at::Tensor sink_gradient_in(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& sink) {
  using real_t = at::opmath_type<scalar_t>;
  using lanes_t = at::vec::Vectorized<real_t>;
  const int64_t heads = out.size(1), length = out.size(2), head_dim = out.size(3);
  at::Tensor gradient = at::empty(lse.sizes(), lse.options());
  const scalar_t *grads = grad.const_data_ptr<scalar_t>(), *outs = out.const_data_ptr<scalar_t>();
  const real_t *lses = lse.const_data_ptr<real_t>(), *sinks = sink.const_data_ptr<real_t>();
  real_t* to = gradient.mutable_data_ptr<real_t>();

  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / head_dim);
  at::parallel_for(0, out.size(0) * heads * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / length / heads, h = i / length % heads, row = i % length;
      const auto offset = [&](const at::Tensor& of) { return b * of.stride(0) + h * of.stride(1) + row * of.stride(2); };
      const real_t sum = at::vec::map2_reduce_all<scalar_t>(
          [](lanes_t x, lanes_t y) { return x * y; }, [](lanes_t x, lanes_t y) { return x + y; },
          grads + offset(grad), outs + offset(out), head_dim);
      const real_t share = std::exp(sinks[offset(sink)] - lses[offset(lse)]);
      // An infinite sink has taken the whole row; its out, and so its gradient, is 0.
      to[i] = -(std::isnan(share) ? 1 : share) * sum;
    }
  });
  return gradient;
}

at::Tensor sink_gradient(const at::Tensor& grad, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& sink) {
  at::Tensor gradient;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "sink_gradient", [&] {
    gradient = sink_gradient_in<scalar_t>(grad, out, lse, sink);
  });
  return gradient;
}

// (B, H, n), contiguous, to (B, H, 1). The threads that sum many numbers to one by at::sum decide the bits of it;
// here one thread takes all of a head.
at::Tensor sum_rows(const at::Tensor& of_rows) {
  const int64_t length = of_rows.size(2);
  at::Tensor sums = at::empty({of_rows.size(0), of_rows.size(1), 1}, of_rows.options());
  AT_DISPATCH_FLOATING_TYPES(of_rows.scalar_type(), "sum_rows", [&] {
    const scalar_t* from = of_rows.const_data_ptr<scalar_t>();
    scalar_t* to = sums.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / length);
    at::parallel_for(0, sums.numel(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        to[i] = static_cast<scalar_t>(std::accumulate(from + i * length, from + (i + 1) * length, 0.0));
      }
    });
  });
  return sums;
}

} // namespace
} // namespace stablemask
