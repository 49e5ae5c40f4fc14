// Attention of one row per head over a cache of keys, a share of which a sink takes.
//
// Such a row is bound by memory: the most that can be done is to read every key and value once, in order,
// on every thread. PyTorch's kernel multiplies blocks of rows, for which a lone one has to be packed, and
// never gives a head to two threads. Here the heads that share a key head are served by one reading of it,
// and a long cache is cut into chunks, which are joined at the end. A chunk does not depend on the number
// of threads, so neither do the bits of the result.

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <c10/util/Unroll.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

namespace stablemask {
namespace {

// Sink logits by sequence and head, or one for all.
using Sinks = c10::SmallVector<double, 64>;

template <typename real_t>
using Lanes = at::vec::Vectorized<real_t>;

constexpr int64_t CHUNK = 512; // keys
constexpr int64_t THREAD_BYTES = 1 << 16; // fewer are not worth a thread of their own

template <typename real_t>
constexpr real_t INF = std::numeric_limits<real_t>::infinity();

// Keys or values of one head that follow each other, each of `size` numbers.
template <typename scalar_t>
struct Chunk {
  const scalar_t* data;
  int64_t stride, count, size;
};

template <typename real_t>
Lanes<real_t> load(const real_t* from) {
  return Lanes<real_t>::loadu(from);
}

Lanes<float> load(const at::BFloat16* from) {
  Lanes<float> lanes;
  at::vec::load_fp32_from_bf16(from, lanes);
  return lanes;
}

Lanes<float> load(const at::Half* from) {
  Lanes<float> lanes;
  at::vec::load_fp32_from_fp16(from, lanes);
  return lanes;
}

// The first `count` lanes, zeros after them.
template <typename real_t, typename scalar_t>
Lanes<real_t> load_first(const scalar_t* from, int64_t count) {
  scalar_t padded[Lanes<real_t>::size()] = {};
  std::copy_n(from, count, padded);
  return load(static_cast<const scalar_t*>(padded));
}

template <typename real_t>
real_t sum_of(const Lanes<real_t>& lanes) {
  return at::vec::vec_reduce_all<real_t>(
      [](const Lanes<real_t>& x, const Lanes<real_t>& y) { return x + y; }, lanes);
}

// scores[r][i] = rows[r] . keys[i], for R rows that are `width` apart and scores that are CHUNK apart.
template <int R, typename real_t, typename scalar_t>
void score(const real_t* rows, int64_t width, const Chunk<scalar_t>& keys, real_t* scores) {
  constexpr int64_t LANES = Lanes<real_t>::size();
  for (int64_t i = 0; i < keys.count; ++i) {
    const scalar_t* key = keys.data + i * keys.stride;
    Lanes<real_t> sums[R];
    c10::ForcedUnroll<R>{}([&](auto r) { sums[r] = Lanes<real_t>(0); });
    const auto add = [&](int64_t d, const Lanes<real_t>& lanes) {
      c10::ForcedUnroll<R>{}(
          [&](auto r) { sums[r] = at::vec::fmadd(load(rows + r * width + d), lanes, sums[r]); });
    };
    int64_t d = 0;
    for (; d + LANES <= keys.size; d += LANES) {
      add(d, load(key + d));
    }
    if (d < keys.size) {
      add(d, load_first<real_t>(key + d, keys.size - d));
    }
    c10::ForcedUnroll<R>{}([&](auto r) { scores[r * CHUNK + i] = sum_of(sums[r]); });
  }
}

// Puts exponentials in place of a row's scores, over the largest of them.
template <typename real_t>
void exponentiate(real_t* scores, int64_t count, real_t& largest, real_t& sum) {
  constexpr int64_t LANES = Lanes<real_t>::size();
  std::fill(scores + count, scores + at::round_up(count, LANES), -INF<real_t>);
  Lanes<real_t> most(-INF<real_t>), total(0);
  for (int64_t i = 0; i < count; i += LANES) {
    most = at::vec::maximum(most, load(scores + i));
  }
  largest = at::vec::vec_reduce_all<real_t>(
      [](const Lanes<real_t>& x, const Lanes<real_t>& y) { return at::vec::maximum(x, y); }, most);
  const Lanes<real_t> shift(largest == -INF<real_t> ? 0 : largest);
  for (int64_t i = 0; i < count; i += LANES) {
    const auto terms = (load(scores + i) - shift).exp();
    terms.store(scores + i);
    total = total + terms;
  }
  sum = sum_of(total);
}

// sums[r] = the sum of weights[r][i] * values[i], for V vectors, which `load_value` loads, from lane d on.
template <int R, int V, typename real_t, typename scalar_t, typename Load>
void mix(const real_t* weights, const Chunk<scalar_t>& values, int64_t d, const Load& load_value, real_t* sums,
         int64_t sums_stride) {
  // Unrolled by templates, so that they are registers.
  Lanes<real_t> totals[R * V], lanes[V], weight;
  c10::ForcedUnroll<R * V>{}([&](auto j) { totals[j] = Lanes<real_t>(0); });
  for (int64_t i = 0; i < values.count; ++i) {
    const scalar_t* value = values.data + i * values.stride + d;
    c10::ForcedUnroll<V>{}([&](auto v) { lanes[v] = load_value(value + v * Lanes<real_t>::size()); });
    c10::ForcedUnroll<R * V>{}([&](auto j) {
      if (j % V == 0) {
        weight = Lanes<real_t>(weights[j / V * CHUNK + i]);
      }
      totals[j] = at::vec::fmadd(weight, lanes[j % V], totals[j]);
    });
  }
  c10::ForcedUnroll<R * V>{}(
      [&](auto j) { totals[j].store(sums + j / V * sums_stride + d + j % V * Lanes<real_t>::size()); });
}

// What R rows find in a chunk, `stride` apart: of each its largest score, the sum of the exponentials over
// it, and that of the values by them. Keys that are not seen, where it is told, have no part in it.
template <int R, typename real_t, typename scalar_t>
void attend_chunk(const real_t* rows, int64_t width, const Chunk<scalar_t>& keys, const Chunk<scalar_t>& values,
                  const bool* seen, real_t* scores, real_t* found, int64_t stride) {
  constexpr int64_t LANES = Lanes<real_t>::size(), V = LANES < 16 ? 2 : 4; // as many as there are registers for
  score<R>(rows, width, keys, scores);
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; seen != nullptr && i < keys.count; ++i) {
      scores[r * CHUNK + i] = seen[i] ? scores[r * CHUNK + i] : -INF<real_t>;
    }
    exponentiate(scores + r * CHUNK, keys.count, found[r * stride], found[r * stride + 1]);
  }
  const auto whole = [](const scalar_t* from) { return load(from); };
  int64_t d = 0;
  for (; d + V * LANES <= values.size; d += V * LANES) {
    mix<R, V>(scores, values, d, whole, found + 2, stride);
  }
  for (; d + LANES <= values.size; d += LANES) {
    mix<R, 1>(scores, values, d, whole, found + 2, stride);
  }
  if (d < values.size) {
    const auto first = [&](const scalar_t* from) { return load_first<real_t>(from, values.size - d); };
    mix<R, 1>(scores, values, d, first, found + 2, stride);
  }
}

// What a row has found in `count` chunks, `stride` apart: the mean of its values, less the sink's share. The result
// is the logsumexp of its scores and the sink.
template <typename real_t, typename scalar_t>
real_t join(real_t* found, int64_t count, int64_t stride, double sink, int64_t size, scalar_t* out) {
  real_t largest = -INF<real_t>, sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    largest = std::max(largest, found[c * stride]);
  }
  for (int64_t c = 0; c < count; ++c) {
    const real_t* chunk = found + c * stride;
    const real_t factor = chunk[0] == -INF<real_t> ? 0 : std::exp(chunk[0] - largest);
    sum += factor * chunk[1];
    for (int64_t d = 2; d < size + 2; ++d) {
      found[d] = factor * chunk[d] + (c == 0 ? 0 : found[d]);
    }
  }
  const real_t lse = largest + std::log(sum), other = static_cast<real_t>(sink);
  const real_t kept = 1 / (1 + std::exp(other - lse));
  const real_t share = sum == 0 ? 0 : kept / sum;
  for (int64_t d = 0; d < size; ++d) {
    out[d] = static_cast<scalar_t>(found[d + 2] * share);
  }
  const real_t more = std::max(lse, other), less = std::min(lse, other);
  return std::isinf(more) ? more : more + std::log1p(std::exp(less - more));
}

// Out (batch, heads, 1, value_dim) and lse (batch, heads, 1), for queries (batch, heads, 1, head_dim), keys (batch,
// key heads, n, head_dim) and values (batch, key heads, n, value_dim). The last axis of each is contiguous, and none is
// empty. A mask is of bool, (batch, 1, 1, n); it may be undefined.
template <typename scalar_t>
std::tuple<at::Tensor, at::Tensor> attend_row(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                              const at::Tensor& mask, const Sinks& sinks, double scale) {
  using real_t = at::opmath_type<scalar_t>;
  constexpr int64_t LANES = Lanes<real_t>::size();
  const int64_t batch = query.size(0), heads = query.size(1), head_dim = query.size(3), value_dim = value.size(3);
  const int64_t key_heads = key.size(1), kv_len = key.size(2), groups = heads / key_heads;
  const int64_t chunks = at::ceil_div(kv_len, CHUNK);
  const int64_t width = at::round_up(head_dim, LANES), stride = at::round_up(value_dim, LANES) + 2;
  // By batch, key head, chunk and group.
  const std::unique_ptr<real_t[]> found(new real_t[batch * key_heads * chunks * groups * stride]);
  const auto grain = [](int64_t bytes) { return std::max<int64_t>(1, THREAD_BYTES / bytes); };

  const auto chunk_of = [&](const at::Tensor& cache, int64_t b, int64_t h, int64_t first) -> Chunk<scalar_t> {
    const int64_t offset = b * cache.stride(0) + h * cache.stride(1) + first * cache.stride(2);
    const scalar_t* data = cache.const_data_ptr<scalar_t>() + offset;
    return {data, cache.stride(2), std::min(CHUNK, kv_len - first), cache.size(3)};
  };
  const int64_t chunk_bytes = std::min(CHUNK, kv_len) * (head_dim + value_dim) * sizeof(scalar_t);
  at::parallel_for(0, batch * key_heads * chunks, grain(chunk_bytes), [&](int64_t begin, int64_t end) {
    std::vector<real_t> rows(groups * width), scores(4 * CHUNK);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks / key_heads, h = i / chunks % key_heads, first = i % chunks * CHUNK;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t offset = b * query.stride(0) + (h * groups + g) * query.stride(1);
        const scalar_t* row = query.const_data_ptr<scalar_t>() + offset;
        std::transform(row, row + head_dim, rows.data() + g * width,
                       [&](scalar_t x) { return static_cast<real_t>(x) * static_cast<real_t>(scale); });
      }
      const auto keys = chunk_of(key, b, h, first), values = chunk_of(value, b, h, first);
      const bool* seen = mask.defined() ? mask.const_data_ptr<bool>() + b * mask.stride(0) + first : nullptr;
      real_t* part = found.get() + i * groups * stride;
      for (int64_t g = 0, count; g < groups; g += count) {
        count = groups - g >= 4 ? 4 : groups - g >= 2 ? 2 : 1;
        const auto attend_rows = count == 4 ? attend_chunk<4, real_t, scalar_t>
            : count == 2                    ? attend_chunk<2, real_t, scalar_t>
                                            : attend_chunk<1, real_t, scalar_t>;
        attend_rows(rows.data() + g * width, width, keys, values, seen, scores.data(), part + g * stride, stride);
      }
    }
  });

  at::Tensor out = at::empty({batch, heads, 1, value_dim}, query.options());
  at::Tensor lse = at::empty({batch, heads, 1}, query.options().dtype(c10::CppTypeToScalarType<real_t>::value));
  scalar_t* outs = out.mutable_data_ptr<scalar_t>();
  real_t* lses = lse.mutable_data_ptr<real_t>();
  const int64_t row_bytes = chunks * stride * sizeof(real_t);
  at::parallel_for(0, batch * heads, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      real_t* row = found.get() + (i / groups * chunks * groups + i % groups) * stride;
      const double sink = sinks.size() == 1 ? sinks[0] : sinks[i];
      lses[i] = join(row, chunks, groups * stride, sink, value_dim, outs + i * value_dim);
    }
  });
  return {out, lse};
}

} // namespace
} // namespace stablemask
